"""The harness of the caching comparison: sampling, metering, resuming, timing, the report. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the example is built on diffusers")
ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from test_example import tiny_pipeline  # noqa: E402

from benchmarks.caching import __main__ as curve  # noqa: E402
from benchmarks.caching import meter, plan, quality, report, runs, timing  # noqa: E402
from benchmarks.caching.model import Setting, load, sample  # noqa: E402
from benchmarks.caching.store import Store  # noqa: E402

PEER = "diffusers.FirstBlockCache:threshold=0.9"
OURS = "FORA:interval=2"
needs_cache_dit = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)  # adaLN-zero gates: closed, nothing that is reused would matter
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def setting(model_folder):
    return Setting(images=4, steps=4, batch=2, dtype="float32", model=str(model_folder))


def options(setting: Setting, out: Path, *more: str) -> list[str]:
    text = f"--images 4 --steps 4 --batch 2 --dtype float32 --model {setting.model} --out {out} --data {out}"
    return [*text.split(), *more]


def test_the_whole_way(setting, tmp_path, capsys):
    out, page, results = tmp_path / "out", tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"# Curve\n\n{report.BEGIN}\noutdated figures\n{report.END}\n\nBelow.\n")
    chosen = ["--run", OURS, "--run", PEER, "--run", "FORA:interval=2+FusedAdaLN"]
    curve.main(["quality", *options(setting, out, *chosen)])
    curve.main(["timing", *options(setting, out, *chosen, "--rounds", "2")])
    curve.main(["report", *options(setting, out, *chosen, "--results", str(results), "--page", str(page))])
    assert "no Fréchet distance" in capsys.readouterr().out
    data = json.loads(results.read_text())
    rows = {row["run"]: row for row in data["rows"]}
    assert list(rows) == sorted(rows, key=lambda run: -rows[run]["timing"]["speedup"]["median"])
    assert set(rows) == {OURS, PEER, "FORA:interval=2+FusedAdaLN"}
    for row in rows.values():
        assert row["repeatable"]
        assert 0 < row["compute"] < 1
        assert row["psnr_db"]["lowest"] <= row["psnr_db"]["median"]
        assert row["timing"]["rounds"] == 2
        assert row["timing"]["seconds"]["min"] > 0
        assert row["bytes_held"] > 0
    assert rows[OURS]["reduced_calls"] == 0.5
    reported, held = rows[OURS]["bytes_reported"], rows[OURS]["bytes_held"]
    assert reported <= held < 1.05 * reported  # weights of the forecast and the like come on top
    assert rows[PEER]["reduced_calls"] == 0.75  # threshold 0.9: all but the first step
    text = page.read_text()
    assert text.startswith("# Curve")
    assert text.endswith("Below.\n")
    assert "outdated" not in text
    assert "| **FORA** | interval=2 + FusedAdaLN |" in text
    assert "| diffusers.FirstBlockCache | threshold=0.9 |" in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert page.with_suffix(".png").stat().st_size > 5000


def test_finished_work_is_not_repeated(setting, tmp_path, monkeypatch):
    arguments = options(setting, tmp_path, "--run", OURS)
    curve.main(["quality", *arguments])
    curve.main(["timing", *arguments, "--rounds", "1"])
    before = {path.name: path.read_text() for path in tmp_path.glob("*.json")}

    def forbidden(*_args, **_kwargs):
        raise AssertionError("sampled again")

    with monkeypatch.context() as patched:
        patched.setattr(quality, "sample", forbidden)
        patched.setattr(timing, "sample", forbidden)
        curve.main(["quality", *arguments])
        curve.main(["timing", *arguments, "--rounds", "1"])
    assert before == {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    curve.main(["timing", *arguments, "--rounds", "2"])  # one more round, the first is kept
    rounds = Store(tmp_path, setting).read(OURS, "timing.json")["rounds"]
    assert rounds[0] == json.loads(before[f"{runs.slug(OURS)}.timing.json"])["rounds"][0]
    assert [list(entry) for entry in rounds] == [["baseline", "run"], ["run", "baseline"]]


def test_a_folder_holds_one_setting(setting, tmp_path):
    Store(tmp_path, setting)
    Store(tmp_path, setting)
    with pytest.raises(ValueError, match="holds runs with steps=4"):
        Store(tmp_path, Setting(**{**setting.as_dict(), "steps": 5}))


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="images must be an int of at least 1, got 0"):
        Setting(images=0)


@pytest.mark.parametrize(
    "text",
    [
        PEER,
        "diffusers.TaylorSeer:interval=2,first=2",
        "diffusers.TaylorSeer:interval=2,first=2,sites='model'",
        "diffusers.MagCache:threshold=1e9,retention=0.25",
        "diffusers.SeaCache:threshold=1e9,order=0",
        "diffusers.PAB:interval=2",
        "diffusers.FasterCache:start=1001,unconditional_start=1001",
        pytest.param("cache-dit.DBCache:threshold=0.9,warmup=2", marks=needs_cache_dit),
        pytest.param("cache-dit.DBCache:threshold=0.9,warmup=2,calibrator='taylor1'", marks=needs_cache_dit),
        pytest.param("cache-dit.SCM:policy='ultra'", marks=needs_cache_dit),
    ],
)
def test_peers_reuse_and_begin_every_batch_afresh(setting, text):
    if runs.absent(text) is not None:
        pytest.skip(str(runs.absent(text)))
    setting = Setting(**{**setting.as_dict(), "steps": 6})
    plain, _ = quality.sample_run(runs.BASELINE, setting, progress=False)
    images, work = quality.sample_run(text, setting, progress=False)
    assert work["repeatable"]
    assert work["calls"] == 12
    assert work["reduced_calls"] > 0
    assert work["bytes_held"] > 0
    assert not torch.equal(images, plain)
    # Nothing of a peer is left behind in what the next run loads.
    again, clean = quality.sample_run(runs.BASELINE, setting, progress=False)
    assert torch.equal(again, plain)
    assert clean["reduced_calls"] == clean["bytes_held"] == 0


def test_faster_cache_keeps_the_branches_apart(setting):
    """Its conditional half must be ours: with nothing skipped, the images are those of the plain model."""
    plain, _ = quality.sample_run(runs.BASELINE, setting, progress=False)
    images, _ = quality.sample_run("diffusers.FasterCache:start=-1,unconditional_start=-1", setting, progress=False)
    assert torch.allclose(images, plain, atol=1e-5)


def test_absent_runs_say_why(monkeypatch):
    assert runs.absent("none") is runs.absent(OURS) is runs.absent(PEER) is None
    assert "no Nothing" in runs.absent("Nothing:x=1")
    assert "no peer" in runs.absent("elsewhere.Thing")
    assert "'x'" in runs.absent("diffusers.PAB:interval=2,x=1")
    assert "interval=0" in runs.absent("FORA:interval=0")
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    assert runs.absent("cache-dit.DBCache") == "cache_dit is not installed"


def test_planned_runs_are_distinct_and_readable():
    assert len(set(plan.RUNS)) == len({runs.slug(text) for text in plan.RUNS}) == len(plan.RUNS)
    unusable = {text: runs.absent(text) for text in plan.RUNS}
    known = ("is not installed", "maskaccel.methods has no")
    assert not {text: why for text, why in unusable.items() if why is not None and not any(k in why for k in known)}


def test_listing_runs_nothing(setting, tmp_path, capsys):
    curve.main(["quality", "--list", "--only", "^FORA", *options(setting, tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["none", "missing"]
    assert all(line.startswith("FORA") for line in lines[1:])


def test_meter_counts_operations_of_one_call(setting):
    pipe = load(setting)
    with meter.Meter(pipe.transformer) as metered:
        sample(pipe, setting, range(2))
    found = metered.totals()
    config = pipe.transformer.config
    width, tokens, rows = config.num_attention_heads * config.attention_head_dim, 16, 4
    # Products of a block: four of attention and two of the MLP (8 width^2), attention itself.
    block = 2 * rows * tokens * 12 * width**2 + 2 * 2 * rows * tokens**2 * width
    per_call = found["flops"] / found["calls"]
    assert found["calls"] == 4
    assert 2 * block < per_call < 2 * block * 1.6  # embeddings, modulation and the output come on top
    assert found["reduced_calls"] == 0


def test_held_bytes_counts_each_storage_once():
    model = nn.Linear(4, 4)
    model.cache = {"a": [torch.zeros(10)], "weight": model.weight}
    model.cache["same"] = model.cache["a"][0][:5]
    model.cache["loop"] = model.cache
    assert meter.held_bytes(model) == 40


def test_report_of_made_up_rows(setting, tmp_path):
    store = Store(tmp_path, setting)
    with pytest.raises(ValueError, match="holds no baseline"):
        report.collect(["none"], store)
    mark = {
        "commit": "abc", "time": "2030-01-01", "load_average": [1.5, 1, 1], "system": "", "python": "3", "versions": {},
        "cpu": {"model": "CPU"}, "threads": 1, "native": {},
    }  # fmt: skip
    common = {"images": 4, "class_accuracy": 0.9, "by_class": {"a": 0.9}, "frechet_distance": 2.0, "calls": 100,
              "reported": {}, "repeatable": True, "environment": mark}  # fmt: skip
    store.write("none", "quality.json", {**common, "flops": 1000, "reduced_calls": 0, "bytes_held": 0})
    psnr = {"mean": 30.0, "median": 31.0, "lowest": 20.0}
    for text, flops in ((OURS, 500), (PEER, 250)):
        row = {**common, "flops": flops, "reduced_calls": 50, "bytes_held": 2_000_000, "psnr_db": psnr}
        store.write(text, "quality.json", {**row, "class_accuracy": 0.85, "repeatable": text == OURS})
    untimed = report.collect(["none", OURS, PEER, "Nothing"], store)
    assert [row["run"] for row in untimed["rows"]] == [PEER, OURS]  # by compute
    assert untimed["left_out"] == {"Nothing": "maskaccel.methods has no Nothing"}
    assert "no timings yet" in report.conditions(untimed).lower()

    def side(seconds):
        return {"wall": 2 * seconds, "cpu": seconds, "images": 2}

    for text, seconds in ((OURS, (1.0, 1.0, 2.0)), (PEER, (4.0, 4.0, 8.0))):
        pairs = [{"baseline": side(6.0), "run": side(s)} for s in seconds]
        store.write(text, "timing.json", {"rounds": pairs, "environment": mark})
    data = report.collect(["none", OURS, PEER], store)
    assert [row["run"] for row in data["rows"]] == [OURS, PEER]
    assert data["rows"][0]["timing"]["speedup"] == {"median": 6.0, "min": 3.0, "max": 6.0}
    assert data["rows"][0]["timing"]["seconds"]["median"] == 0.5
    table = report.table(data)
    assert (
        "| **FORA** | interval=2 | 50.0% | 0.500 | 6.00 (3.00 to 6.00) | 30.0 (20.0) | -5.0 | 2.00 | 2.0 MB |" in table
    )
    assert "threshold=0.9 (not repeatable)" in table
    assert "| *unaccelerated* | | 100 % | 3.000 | 1 | | 90.0% | 2.00 | 0 |" in table
    assert json.loads(report.as_json(data)) == data
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.make(["none", OURS], store, tmp_path / "results.json", page)


def test_wall_clock_decides_with_several_threads():
    sides = {"baseline": {"wall": 4.0, "cpu": 8.0, "images": 1}, "run": {"wall": 2.0, "cpu": 2.0, "images": 1}}
    row = {"rounds": [sides], "environment": {"threads": 4}}
    assert timing.summary(row)["speedup"]["median"] == 2.0
    assert timing.summary({**row, "environment": {"threads": 1}})["speedup"]["median"] == 4.0
