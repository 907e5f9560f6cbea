"""The training example: its loop, its ranks, its checkpoints, its data."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("PIL", reason="the example reads images with Pillow")
EXAMPLES = Path(__file__).parents[1] / "examples"
for folder in ("train", "fashion"):
    sys.path.append(str(EXAMPLES / folder))

import networks  # noqa: E402
import parallel  # noqa: E402
import sit  # noqa: E402
import train_dit  # noqa: E402
from objective import loss  # noqa: E402
from options import METHODS, Options, parse  # noqa: E402
from sources import Draws, FolderImages, ResidentDraws, held_out  # noqa: E402
from train_dit import Run, open_held_out, train  # noqa: E402

TINY = {"width": 32, "depth": 6, "heads": 2, "patch": 4, "batch": 4, "log_every": 1, "warmup": 1, "cooldown": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """32 images in the format of Fashion-MNIST: each class a brightness, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("data")
    for prefix, count in (("train", 32), ("t10k", 8)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to((labels * 25)[:, None, None], (count, 28, 28)).astype(np.uint8)
        for kind, values, shape in (("images", images, (count, 28, 28)), ("labels", labels, (count,))):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            name = f"{prefix}-{kind}-idx{len(shape)}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def options(run: Path, data: Path, **changes) -> Options:
    return Options(**{"folder": run, "data": data, "steps": 3, "device": "cpu", **TINY, **changes})


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in log_of(run) if "loss" in record]


def state_of(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same_states(a, b, where: str = "") -> None:
    """Bit-equal trees of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_states(a[key], b[key], f"{where}/{key}")


# ---------------------------------------------------------------- several ranks


def _rank(rank: int, world: int, port: int, jobs: list[Options]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    for job in jobs:
        train(job)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ranks_runs(data, tmp_path_factory) -> Path:
    """Runs of one rank and of two, all of two ranks in one pair of processes: starting those is what takes time."""
    root = tmp_path_factory.mktemp("ranks")
    jobs = []
    for method in METHODS:
        common = {"method": method, "lr": 3e-3, "steps": 2}
        train(options(root / f"{method}-one", data, **common))
        jobs.append(options(root / f"{method}-ddp", data, **common))
        jobs.append(options(root / f"{method}-fsdp", data, **common, parallel="fsdp", eval_every=2))
    jobs += [
        options(root / "parts", data, parallel="fsdp", steps=2),
        options(root / "parts", data, parallel="fsdp", resume=True),
        options(root / "accumulated", data, accumulate=2),
    ]
    mp.spawn(_rank, (2, free_port(), jobs), nprocs=2)
    train(options(root / "whole", data))
    return root


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one(ranks_runs, method, kind):
    one, two = (losses(ranks_runs / f"{method}-{name}") for name in ("one", kind))
    assert len(one) == 2
    # Only the order of sums differs; a wrong sample or token would change the loss in its second digit.
    np.testing.assert_allclose(two, one, rtol=2e-5)


def test_a_sharded_run_resumes_and_its_checkpoint_is_whole(ranks_runs):
    parts, whole = ranks_runs / "parts", ranks_runs / "whole"
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=2e-5)
    for name, tensor in state_of(whole)["model"].items():
        torch.testing.assert_close(state_of(parts)["model"][name], tensor, rtol=1e-3, atol=1e-4)


def test_accumulated_parts_and_ranks_make_the_same_batch(ranks_runs):
    np.testing.assert_allclose(losses(ranks_runs / "accumulated"), losses(ranks_runs / "whole"), rtol=2e-5)


# ---------------------------------------------------------------- one rank


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(data, tmp_path, method):
    chosen = options(tmp_path, data, method=method, steps=20, batch=8, lr=1e-2, ema=0.5, eval_every=20)
    train(chosen)
    batch = open_held_out(chosen)
    start = (batch.noise - batch.images).square().mean().item()  # of a network that predicts 0, as all do at first
    assert log_of(tmp_path)[-1]["eval_loss"] < 0.75 * start
    curve = losses(tmp_path)
    assert np.mean(curve[-3:]) < 0.8 * np.mean(curve[:3])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_tokens_are_dropped_until_the_last_part_of_a_run(data, tmp_path, method):
    """In eval mode nothing is dropped; in training it is, and other tokens in other steps, until `dense_from`."""
    chosen = options(tmp_path, data, method=method, steps=4, dense_share=0.5)
    with parallel.ranks("cpu") as where:
        run = Run(chosen, where)
        for p in run.objective.parameters():  # from zero gates nothing would reach the output
            torch.nn.init.normal_(p, std=0.1)
        batch = run.draws.step(0, 0, 4)
        with torch.no_grad():
            masked = [loss(run.objective, replace(batch, step=step)) for step in (0, 1, 0)]
            last = loss(run.objective, replace(batch, step=2))
            run.objective.eval()
            dense = loss(run.objective, batch)
    assert torch.equal(masked[0], masked[2]) and not torch.allclose(masked[0], masked[1], rtol=1e-4)
    assert not torch.allclose(masked[0], dense, rtol=1e-4)
    if method != "sprint":  # which also drops paths in training
        torch.testing.assert_close(last, dense)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_bit_equal(data, tmp_path, method):
    changes = {"method": method, "label_drop": 0.5, "flip": True}
    train(options(tmp_path / "whole", data, steps=4, **changes))
    train(options(tmp_path / "parts", data, steps=2, **changes))
    train(options(tmp_path / "parts", data, steps=4, resume=True, **changes))
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    for part in ("model", "ema", "optimizer"):
        assert_same_states(whole[part], parts[part], part)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert parts["seconds"] > 0 and parts["cpu_seconds"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_dit_of_diffusers_and_every_option_run(data, tmp_path, method):
    pytest.importorskip("diffusers")
    train(options(tmp_path, data, method=method, network="dit", steps=2, dtype="bf16", snapshot_every=2))
    assert np.isfinite(losses(tmp_path)).all()
    assert torch.load(tmp_path / "ema-000002.pt", weights_only=True)["step"] == 2


def test_log_says_what_a_step_costs(data, tmp_path):
    train(options(tmp_path, data, steps=2))
    record = log_of(tmp_path)[-1]
    assert record["step"] == 2
    assert record["cpu_seconds"] > 0 and record["seconds"] > 0
    assert record["images_per_second"] > 0 and record["peak_memory_mib"] > 50


# ---------------------------------------------------------------- networks and data


def test_rotary_positions_make_attention_relative():
    """Scores of two tokens depend on their offset alone, along rows and along columns."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    cos, sin = (table.double() for table in sit.rope_tables(8, 16))
    turn = lambda x, at: sit.rotate(x, (cos[at : at + 1], sin[at : at + 1]))  # noqa: E731
    score = lambda a, b: (turn(q, a) * turn(k, b)).sum().item()  # noqa: E731
    for a, b in ((0, 11), (3, 60)):  # also by a row and by a column further on
        moved = [(a + 8, b + 8), (a + 1, b + 1)] if b < 55 else [(a + 1, b + 1)]
        for pair in moved:
            assert score(*pair) == pytest.approx(score(a, b), rel=1e-5)
    assert score(0, 1) != pytest.approx(score(0, 8), rel=1e-3)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_network_starts_at_zero_and_tells_labels_and_times_apart(kind):
    if kind == "dit":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = networks.build(
        kind, size=8, channels=3, patch=2, width=32, depth=2, heads=2, classes=4, rope=kind == "sit"
    ).eval()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 4])
    assert networks.velocity(network, x, t, y).abs().max() == 0
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = networks.velocity(network, x, t, y)
    assert out.shape == x.shape
    assert not torch.allclose(out, networks.velocity(network, x, t, y.flip(0)))
    assert not torch.allclose(out, networks.velocity(network, x, t.flip(0), y))


@pytest.fixture
def pictures(tmp_path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (folder / name / "more").mkdir(parents=True)
        Image.new("RGB", (40, 24), colour).save(folder / name / "wide.png")
        Image.new("L", (10, 30), 128).save(folder / name / "more" / "tall.jpg")
        (folder / name / "notes.txt").write_text("no image")
    return folder


def test_image_folder(pictures, data, tmp_path):
    source = FolderImages(pictures, 16)
    assert (len(source), source.classes) == (4, ("blue", "red"))
    assert source.labels.tolist() == [0, 0, 1, 1]
    images = source.load(range(4))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    assert images[1].flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 255]  # blue, wide.png
    assert FolderImages(pictures, 16, channels=1).load([0]).shape == (1, 1, 16, 16)
    train(options(tmp_path / "run", pictures, steps=2, size=16, eval_every=2, eval_data=pictures))
    assert len(losses(tmp_path / "run")) == 2 and "eval_loss" in log_of(tmp_path / "run")[-1]


def test_a_folder_image_is_cut_from_the_middle(tmp_path):
    from PIL import Image

    (tmp_path / "one").mkdir()
    stripes = np.zeros((16, 48, 3), np.uint8)
    stripes[:, 16:32] = 200
    Image.fromarray(stripes).save(tmp_path / "one" / "stripes.png")
    image = FolderImages(tmp_path, 16).load([0])[0]
    assert image.min() == image.max() == 200


def test_samples_follow_from_their_number_alone(data):
    source = train_dit.open_source(options(data, data))
    draws = Draws(source, 8, seed=3, label_drop=0.5, flip=True)
    whole = draws.step(5, 0, 8)
    for first in (0, 4):
        part = draws.step(5, first, 4)
        for name in ("images", "labels", "times", "noise"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + 4]), name
    other = Draws(source, 8, seed=4, label_drop=0.5, flip=True).step(5, 0, 8)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.times, other.times)
    assert (whole.labels == 10).any() and (whole.labels != 10).any()
    # 4 steps of 8 are an epoch of the 32 images
    plain = Draws(source, 8, seed=3, label_drop=0.0)
    seen = torch.cat([plain.step(step, 0, 8).labels for step in range(4)])
    assert sorted(seen.tolist()) == sorted(source.labels.tolist())
    assert not torch.equal(seen, torch.cat([plain.step(step, 0, 8).labels for step in range(4, 8)]))
    many = torch.cat([draws.step(step, 0, 8).noise for step in range(8)])
    assert many.mean().abs() < 0.02 and abs(many.std() - 1) < 0.02
    assert torch.equal(held_out(source, 8).noise, held_out(source, 8).noise)


def test_samples_drawn_on_the_device(data, tmp_path):
    """The same on any number of ranks; each image once an epoch, also where a batch lies in two; a share of labels."""
    source = train_dit.open_source(options(data, data, size=40))
    assert source.load([0, 1]).shape == (2, 1, 40, 40)
    make = lambda drop: ResidentDraws(source, 12, 3, drop, True, torch.device("cpu"))  # noqa: E731
    draws = make(0.5)
    whole, parts = draws.step(5, 0, 12), [make(0.5).step(5, first, 6) for first in (0, 6)]
    for name in ("images", "labels", "times", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert (whole.labels == 10).any() and (whole.labels != 10).any()
    plain = make(0.0)
    seen = torch.cat([plain.step(step, 0, 12).labels for step in range(8)])  # three epochs of 32
    for epoch in seen.split(32):
        assert sorted(epoch.tolist()) == sorted(source.labels.tolist())
    assert not torch.equal(seen[:32], seen[32:64])
    noise = torch.cat([plain.step(step, 0, 12).noise for step in range(8)])
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert 0 < whole.times.min() < whole.times.max() < 1


def test_a_run_with_resident_images_resumes_bit_equal(data, tmp_path):
    settings = {"resident": True, "method": "tread", "label_drop": 0.3, "flip": True}
    train(options(tmp_path / "whole", data, steps=4, **settings))
    train(options(tmp_path / "parts", data, steps=2, **settings))
    train(options(tmp_path / "parts", data, steps=4, resume=True, **settings))
    states = [state_of(tmp_path / name) for name in ("whole", "parts")]
    assert_same_states(*({k: state[k] for k in ("model", "ema", "optimizer")} for state in states))
    with pytest.raises(ValueError, match="resume: the run has resident=True, not False"):
        train(options(tmp_path / "parts", data, steps=5, resume=True, **{**settings, "resident": False}))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method='magic'; allowed are none, "),
        ({"network": "unet"}, "network='unet'; allowed are sit, dit"),
        ({"dtype": "int8"}, "dtype='int8'; allowed are fp32, bf16"),
        ({"batch": 0}, "batch=0 must be 1 or more"),
        ({"label_drop": 1.5}, "label_drop=1.5"),
        ({"batch": 5, "accumulate": 2}, "batch=5 must be a multiple of 2"),
        ({"patch": 5}, "patch=5 does not divide size=32"),
        ({"width": 40}, "width=40 and heads=2"),
        ({"size": 28}, "size=28: Fashion-MNIST has 32 pixels"),
        ({"parallel": "fsdp"}, "start it with torchrun"),
        ({"network": "dit", "rope": True}, "rope=True"),
        ({"method": "tread", "depth": 4}, "end=-4"),
        ({"dense_share": 2.0}, "dense_share=2.0 must lie in [0, 1]"),
    ],
)
def test_bad_options(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(options(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run").exists()


def test_bad_folders(data, tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(options(tmp_path / "run", tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in sub-folders"):
        train(options(tmp_path / "run", tmp_path / "empty"))
    with pytest.raises(ValueError, match="channels=4; allowed are 1 and 3"):
        train(options(tmp_path / "run", pictures, channels=4))
    with pytest.raises(ValueError, match="eval_every needs eval_data"):
        train(options(tmp_path / "run", pictures, eval_every=1))
    with pytest.raises(FileNotFoundError, match=r"resume: .* does not exist"):
        train(options(tmp_path / "run", data, resume=True))


def test_a_run_is_neither_overwritten_nor_changed(data, tmp_path):
    train(options(tmp_path, data, steps=2))
    with pytest.raises(FileExistsError, match="holds a run already: add --resume"):
        train(options(tmp_path, data, steps=3))
    with pytest.raises(ValueError, match=r"resume: the run has lr=0\.001, not 0.1"):
        train(options(tmp_path, data, steps=3, lr=0.1, resume=True))
    with pytest.raises(ValueError, match="resume: the run has 2 steps already; steps=2"):
        train(options(tmp_path, data, steps=2, resume=True))


def test_command_line(data, tmp_path, capsys):
    parsed = parse(["--folder", str(tmp_path), "--data", str(data), "--lr", "0.5", "--rope", "--log-every", "7"])
    assert (parsed.folder, parsed.data, parsed.lr, parsed.rope, parsed.log_every) == (tmp_path, data, 0.5, True, 7)
    assert parsed.steps == Options(tmp_path).steps and parsed.eval_data is None
    with pytest.raises(SystemExit):
        parse(["--folder", "x", "--method", "magic"])
    assert "--method" in capsys.readouterr().err


# ---------------------------------------------------------------- the comparison


def test_equal_compute_counts_what_each_part_of_a_run_costs(tmp_path):
    compare = pytest.importorskip("compare")
    costs = {"none": [2.0, 2.0], "tread": [1.0, 1.0], "sprint": [0.5, 2.0]}
    assert compare.steps_of("tread", costs, 100) == 200
    steps = compare.steps_of("sprint", costs, 100)  # four fifths at 0.5, one fifth at 2
    run = compare.options(tmp_path, "sprint", steps=steps)
    assert steps == 250 and compare.seconds_at(steps, run, costs) == pytest.approx(200)
    assert compare.seconds_at(run.dense_from, run, costs) == pytest.approx(100)
    log = [{"step": 10, "loss": 1.0, "cpu_seconds": 6.0}, {"step": 10, "eval_loss": 0.9}, {"step": 10, "loss": 0.8}]
    run.folder.mkdir()
    (run.folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    assert compare.curve(run, costs) == [
        {"step": 10, "loss": 0.8, "cpu_seconds": 6.0, "eval_loss": 0.9, "time": 5.0}
    ]  # a step that a resumed run tells again counts once


def test_the_tables_of_the_page_are_the_measured_ones():
    compare = pytest.importorskip("compare")
    text = (EXAMPLES.parent / "docs" / "training.md").read_text(encoding="utf-8")
    result = json.loads((EXAMPLES.parent / "benchmarks" / "results" / "train_compare.json").read_text())
    assert compare.page.put(text, "compare", compare.table(result)) == text
    assert compare.page.put(text, "costs", compare.cost_table(result)) == text


def test_page_and_options_name_the_same_methods():
    text = (EXAMPLES.parent / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"| `{method}` |" in text for method in METHODS)


def test_samples_of_a_run(data, tmp_path):
    from sample import grid, load, samples

    train(options(tmp_path, data, method="sprint", steps=2))
    path = tmp_path / "checkpoint.pt"
    images = samples(path, 6, steps=2, guidance=2.0, batch=4)
    assert images.shape == (6, 1, 32, 32) and images.abs().max() <= 1
    torch.testing.assert_close(samples(path, 6, steps=2, guidance=2.0, batch=6), images)  # noise by number of image
    assert grid(images, 3).size == (96, 64)
    objective, _ = load(path)
    ema = state_of(tmp_path)["ema"]
    assert all(torch.equal(p, ema[name]) for name, p in objective.named_parameters())


def test_euler_follows_the_field():
    from sample import euler

    noise, still = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    assert torch.allclose(euler(lambda x, t, y: torch.full_like(x, 0.25), noise, still, 4), noise - 0.25)
    guided = euler(lambda x, t, y: x * 0 + y.view(-1, 1, 1, 1), noise, still, 4, guidance=2.0, no_class=1)
    assert torch.allclose(guided, (noise + 1).clamp(-1, 1))  # v_u + 2 (v_c - v_u) with v_u = 1, v_c = 0 is -1
