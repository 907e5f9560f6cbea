"""docs/performance.md out of result files: verdicts, failures, and what it says without a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import cases  # noqa: E402
import report  # noqa: E402
from results import FORMAT, Results, read  # noqa: E402

FAST, SLOW, WRONG = list(cases.all_cases(False))[:3]  # each has a goal of 0.92 of copy


def micro(of_copy: float, of_compile: float, **more) -> dict:
    """A record of the stage `micro` of an op that took a millisecond."""

    def row(ms: float) -> dict:
        return {"median_ms": ms, "min_ms": ms, "max_ms": ms, "gb_per_s": 1.0, "of_copy": of_copy / ms}

    providers = {"cuda": row(1.0), "copy": row(of_copy), "eager": row(3.0), "compile": row(of_compile)}
    return {"providers": providers, "refused": {}, "wrong": {}, **more}


def attention(gains: dict[str, float], index_ms: float | None = None) -> dict:
    """A record of the stage `attention` in which dense cuDNN took ten milliseconds."""
    record = {"gain": gains, "median_ms": {"cudnn": 10.0, "sdpa": 12.0, **{k: 10.0 / g for k, g in gains.items()}}}
    if index_ms is not None:
        record["index_ms"] = {"lists": dict.fromkeys(("0.5", "0.25", "0.1"), index_ms)}
    return record


@pytest.fixture
def found(tmp_path) -> dict:
    """A file with figures above and below their goals, failures, and an entry of another build."""
    path = tmp_path / "gpu.json"
    entries = Results(path, {"device": "Test GPU", "build": "old", "commit": "c" * 40})
    entries.add(
        "micro", WRONG, {"state": "ok", "seconds": 1.0, "record": micro(0.95, 2.0, wrong={"triton": "0.5 off"})}
    )
    entries = Results(path, {"device": "Test GPU", "build": "new", "commit": "d" * 40}, path)
    entries.add("micro", FAST, {"state": "ok", "seconds": 1.0, "record": micro(0.95, 1.25)})
    entries.add("micro", SLOW, {"state": "ok", "seconds": 1.0, "record": micro(0.5, 0.75)})
    gains = {"cuda dense": 0.96, "cuda 0.5": 1.7, "cuda 0.25": 3.8, "cuda 0.1": 9.0}
    entries.add("attention", "16384x24x128 forward", {"state": "ok", "seconds": 1.0, "record": attention(gains, 0.1)})
    entries.add("correctness", "cuda gram", {"state": "failed", "seconds": 1.0, "error": "7 is\nnot 8", "output": ""})
    entries.leave_out("tokens", ["a", "b"], "the budget was spent")
    return read(path)


def verdicts(text: str) -> dict[str, str]:
    """The last cell of each row of the goals."""
    rows = [line.strip("| ").split(" | ") for line in text.split("### ")[1].splitlines() if line.startswith("| ")]
    return {cells[0]: cells[-1] for cells in rows}


def test_figures_below_their_goals_are_missed(found):
    """Reached, missed and not measured, each by its figure; losing ops are marked in their own table too."""
    text = report.text({"gpu": found}, {})
    said = verdicts(text)
    unmeasured = next(line for line in text.splitlines() if line.startswith("Not measured: "))
    assert said[FAST] == "reached" and said[f"{FAST} against torch.compile"] == "reached"
    assert said[SLOW] == "**missed**" and said[f"{SLOW} against torch.compile"] == "**missed**"
    wanted = {"dense": "reached", "50% skipped": "**missed**", "75% skipped": "reached", "90% skipped": "reached"}
    for label, verdict in wanted.items():
        assert said[f"tile_attention 16384x24x128 forward, {label}, of dense cuDNN"] == verdict
        assert f"tile_attention 16384x24x128 backward, {label}, of dense cuDNN" in unmeasured
    # 0.1 ms of lists: 0.1 / (10 - 10 / 1.7) and 0.1 / (10 - 10 / 9)
    share = "building the lists, 16384x24x128, {} skipped, of the time saved"
    assert said[share.format("50%")] == "**missed**" and said[share.format("90%")] == "reached"
    assert f"| {SLOW} **slower than torch.compile** | cuda | 1000.0 | 1 | 50% | 3.00x | 0.75x |" in text
    assert "| 16384x24x128 | forward | cuda | **0.96x** | 1.70x (85%) | 3.80x (95%) | 9.00x (90%) |" in text


def test_failures_and_other_builds_are_named(found):
    """What failed, what was wrong, what was left out, and figures that an earlier build made."""
    text = report.text({"gpu": found}, {})
    assert "- correctness, cuda gram: failed: 7 is not 8" in text
    assert f"- micro, {WRONG}: wrong results: {{'triton': '0.5 off'}}" in text
    assert "- Token dropping: 2 items not run: the budget was spent" in text
    assert "Entries of earlier builds, not run again since: 1 of old (commit cccccccccccc)." in text


def test_a_plot_is_drawn_where_there_is_something_to_draw(found, tmp_path):
    """A file for attention that was measured, none without."""
    pytest.importorskip("matplotlib")
    assert report.draw(found, tmp_path / "a.png") and (tmp_path / "a.png").stat().st_size > 1000
    assert not report.draw({**found, "stages": {}}, tmp_path / "b.png") and not (tmp_path / "b.png").exists()


def test_the_page_holds_what_the_files_say():
    """The page is what the program makes of the result files that are there, and says so if there are none."""
    files = {path.stem: read(path) for path in sorted(report.RESULTS.glob("gpu-*.json"))}
    plots = {name: f"{name}-attention.png" for name in files if report.PAGE.with_name(f"{name}-attention.png").exists()}
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.put(page, "measured", report.text(files, plots)) == page, "run benchmarks/gpu/report.py"
    assert report.text({}, {}) == report.NOTHING


def test_another_file_is_refused(tmp_path):
    """A file of another format is named, not read."""
    (tmp_path / "a.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=r"a\.json is no result file of format"):
        read(tmp_path / "a.json")
