"""The stage `fashion` of `make gpu`, at the sizes of its dry run, on images of one brightness for each class."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the example reads images with Pillow")
pytest.importorskip("diffusers", reason="the network is that of diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

import fashion
from PIL import Image
from safetensors import safe_open
from stage import Context

DRY = Context(device="cpu", tiny=True)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of few images, that the example takes for its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 40), ("t10k", 60)):
        labels = bytes(i % 10 for i in range(count))
        pixels = b"".join(bytes([25 * label]) * 784 for label in labels)
        for name, dims, values in (("images-idx3", (count, 28, 28), pixels), ("labels-idx1", (count,), labels)):
            header = bytes([0, 0, 8, len(dims)]) + b"".join(n.to_bytes(4, "big") for n in dims)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values))
    fashion._examples()
    import data
    import train_dit

    monkeypatch.setattr(data, "DEFAULT_ROOT", folder)
    monkeypatch.setattr(train_dit, "DEFAULT_ROOT", folder)
    return folder


def test_a_run_is_judged_resumed_and_prolonged(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "RUNS", tmp_path / "out")
    assert fashion.warm("SPRINT", DRY)["seconds"] > 0 and not (tmp_path / "out").exists()
    record = fashion.run("SPRINT", DRY)
    folder = tmp_path / "out" / "tiny" / "SPRINT"
    assert [point["step"] for point in record["judged"]][-1] == record["steps"] == record["curve"][-1]["step"] >= 8
    assert all({"loss", "eval_loss", "seconds"} <= point.keys() for point in record["curve"])
    assert record["judged"][0]["frechet_distance"] > 0 and len(record["seconds_of_a_step"]) == 2
    picture, weights = map(Path, record["files"])
    assert Image.open(picture).size == (10 * 32, 4 * 32)
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["config"])["num_layers"] == 6 and file.metadata()["method"] == "sprint"
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118
    assert f"| SPRINT | {record['seconds_of_a_step'][0] * 1e3:.1f} | {record['steps']} |" in fashion.table(
        {"SPRINT": record}
    )
    # ended before its time: what is there is kept
    assert not fashion.unfinished(folder)
    (folder / "result.json").unlink()
    log = (folder / "log.jsonl").read_text()
    again = fashion.run("SPRINT", DRY)
    assert again["steps"] == record["steps"] and (folder / "log.jsonl").read_text() == log
    # prolonged
    longer = 2 * record["steps"] * max(record["seconds_of_a_step"])
    more = fashion.trained("SPRINT", longer, folder, tmp_path / "shown", DRY, resume=True)
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {
        "fashion-SPRINT.png",
        "fashion-SPRINT.safetensors",
    }
    assert more["steps"] > record["steps"] and (folder / "log.jsonl").read_text().startswith(log)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.setattr(fashion, "RUNS", tmp_path / "out")
    (images / "train-images-idx3-ubyte.gz").unlink()
    assert "train-images-idx3-ubyte.gz is missing" in fashion.run("none", DRY)["skipped"]
    assert fashion.warm("none", DRY) == {}
    monkeypatch.setattr(fashion.importlib.util, "find_spec", lambda name: None)
    assert fashion.run("none", DRY)["skipped"] == "no diffusers"


def test_weights_of_the_large_network_are_small_enough_to_ship() -> None:
    fashion._examples()
    import networks

    sizes = {key: fashion._LARGE[key] for key in ("size", "patch", "width", "depth", "heads")}
    network = networks.build("dit", channels=1, classes=10, rope=False, **sizes)
    assert sum(p.numel() for p in network.parameters()) * 2 < 12e6
