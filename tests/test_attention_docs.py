"""The page on sparse attention: its code runs, its table is the measured one, and the table is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.attention import page, sampling, speed, tiles
from maskaccel import methods, ops

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
ROWS = json.loads((ROOT / "benchmarks" / "results" / "attention_tiles.json").read_text())
PATCH, NARROW, SMALL = "patches of 8 x 16", "patches of 8 x 8, tiles of 128 x 64", "patches of 8 x 8, tiles of 64 x 64"
# Touched, in per cent, as computed independently of the library (by exact distances of boxes; borders approximated).
DISCS = {
    (64, 8): (26.2, 21.5, 15.0, 11.8), (64, 16): (46.1, 33.2, 33.2, 28.2), (128, 8): (11.4, 6.2, 4.2, 3.1),
    (128, 16): (22.8, 9.9, 9.9, 8.1), (128, 32): (43.2, 25.7, 24.9, 22.6),
}  # fmt: skip


def _row(mask: str, order: str, side: int | None = None) -> dict:
    found = [r for r in ROWS if r["mask"] == mask and r["order"] == order and side in (None, r["grid"][0])]
    assert len(found) == 1, (mask, order)
    return found[0]


def test_the_examples_run():
    """In order, in one namespace, as a reader would."""
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, "docs/attention.md", "exec"), namespace)
    assert namespace["out"].isfinite().all()
    assert namespace["predicted"].density() < 1
    assert namespace["scenes"].density() < 1
    _check_reports(namespace)
    _check_recipes(namespace)


def _check_reports(namespace: dict) -> None:
    """The report that the page prints is the one that comes, backend aside."""
    backend = re.compile(r"on the \w+ backend")
    assert backend.sub("", str(namespace["clear"])) in backend.sub("", PAGE)
    for name, calls in (("sliding", 2), ("lite", 8)):
        assert namespace[name]["sparse calls"] == calls and namespace[name]["dense calls"] == 0


def _check_recipes(namespace: dict) -> None:
    """Masks of models without a method, against who sees whom in words."""
    i, j = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    rank = namespace["rank"]
    group, of_all, of_target = j // 64, i // 64 == 0, i // 64 == 3
    want = {
        "sinks": (j < 4) | ((i - j).abs() <= 32),
        "mono": torch.where(i < 64, j <= i, True),
        "rar": j <= i,
        "unmoved": rank[j] <= rank[i],
        "in_blocks": j // 64 <= i // 64,
        "grouped": (group == 0) | (group == i // 64) | of_all | of_target,
    }
    for name, kept in want.items():
        assert torch.equal(namespace[name].to_bool()[0, 0], kept), name
        assert namespace[name].density() < 1 or name == "unmoved", name


def test_every_system_has_its_call():
    """Systems whose attention is sparse: a row of the table, a layer or a recipe names each."""
    part = PAGE.split("## Which method is which call")[0].split("## Masks of models")[1]
    for name in ("Attention sinks", "MonoFormer", "RAR", "Why mask diffusion does not work", "ChatDiT"):
        assert name in part, name
    table = PAGE.split("## Which method is which call")[1]
    for name in ("LiteAttention", "Re-ttention", "CLEAR", "Mask2DiT", "DiT-3D", "PT-DiT", "U-DiT", "mediators", "LiT",
                 "DreamActor-H1", "FantasyPortrait", "Mask2Former", "LinFusion", "DiffiT", "MaskGWM",
                 "HDiT"):  # fmt: skip
        assert name in table, name


def test_the_names_of_the_tables_exist():
    ops_part, layers_part = PAGE.split("## Ops")[1].split("## Layers from papers")
    listed = re.findall(r"^\| `(\w+)` \|", ops_part, re.MULTILINE)
    assert {"tile_attention", "merge_attention", "linear_attention", "tile_select"} <= set(listed)
    assert all(hasattr(ops, name) for name in listed)
    layers = {name for name, one in vars(methods).items() if isinstance(one, type) and issubclass(one, nn.Module)}
    described = set(re.findall(r"^::: maskaccel\.methods\.(\w+)$", layers_part, re.MULTILINE))
    tokens_page = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
    elsewhere = set(re.findall(r"^::: maskaccel\.methods\.(\w+)$", tokens_page, re.MULTILINE))
    assert layers - {"ClearPooling", "SkipBranches"} <= described | elsewhere and all(
        hasattr(methods, name) for name in described
    )
    assert all(f"`{name}`" in layers_part for name in described - {"box_regions"})
    for name in ("LiteAttention", "CLEAR", "Mask2DiT"):
        assert hasattr(methods, name)


def test_the_table_is_the_measured_one():
    assert page.put(PAGE, "tiles", tiles.table(ROWS)) == PAGE
    speeds = (ROOT / "docs" / "attention-speed.md").read_text(encoding="utf-8")
    for name, module, file in (("speed", speed, "attention_cpu"), ("sampling", sampling, "attention_sampling")):
        measured = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
        assert page.put(speeds, name, module.table(measured)) == speeds
    assert {(r["mask"], r["order"]) for r in ROWS} == {(c.name, label) for c in tiles.CASES for label in c.orders}


@pytest.mark.parametrize(("side", "radius"), DISCS)
def test_discs(side, radius):
    for order, want in zip(("raster", PATCH, NARROW, SMALL), DISCS[side, radius], strict=True):
        row = _row(f"CLEAR, radius {radius}", order, side)
        assert 100 * row["touched"] == pytest.approx(want, abs=0.35)


def test_cogvideox_in_two_orders():
    """About 23 and 6 per cent of the tiles, for 3 per cent of the elements between video tokens."""
    name = next(c.name for c in tiles.CASES if "CogVideoX" in c.name)
    frames, places = _row(name, "raster"), _row(name, "patches of 13 x 1")
    assert 100 * frames["touched"] == pytest.approx(23, abs=3)
    assert 100 * places["touched"] == pytest.approx(6, abs=3)
    assert frames["elements"] == places["elements"]


@pytest.mark.parametrize(
    ("name", "side"), [("CLEAR, radius 8", 64), ("Box of 13 x 13", 64), ("U-DiT, four sub-grids", 64)]
)
def test_the_library_gives_these_rows(name, side):
    case = next(c for c in tiles.CASES if c.name == name and c.grid[0] == side)
    for label in case.orders:
        assert tiles.row(case, label) == _row(name, label, side)
