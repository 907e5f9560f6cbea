"""The page on caching against the library: every formula of its table is evaluated and compared with what is held."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_skipcache import DEPTH, WIDTH, deep_dit

import maskaccel
from maskaccel import TokenRoute, methods
from maskaccel.calibration import KINDS, Calibration
from maskaccel.methods._active import PartialSteps
from maskaccel.methods._attention import SparseAttention
from maskaccel.state import Storage

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "caching.md").read_text(encoding="utf-8")
# The last column of the rows of the table.
ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| `([^`|]+)` \|$", PAGE, re.MULTILINE))
STEPS = 24
H = 2 * 16 * WIDTH * 4  # both branches of guidance in one batch
PRODUCTS = Calibration.make(
    "products", "DiTTransformer2DModel", DEPTH, STEPS,
    {"products": [[min(i, j) + 1.0 for j in range(STEPS)] for i in range(STEPS)]},
)  # fmt: skip
SOLVERS = Calibration.make(
    "hyca", "DiTTransformer2DModel", DEPTH, STEPS,
    {"level": "stack", "interval": 6, "first": 3, "solvers": ["hold", "newton2"], "channels": ["01" * (WIDTH // 2)]},
)  # fmt: skip
GIVEN = {
    "DBCache": {"threshold": 0.5, "lead": 2, "first": 2}, "SkipCache": {"outer": 2}, "MagCache": {"ratios": "flux"},
    "FBCache": {"threshold": 0.5}, "TeaCache": {"polynomial": (1.0, 0.0)}, "DPCache": {"calibration": PRODUCTS},
    "HyCa": {"calibration": SOLVERS},
}  # fmt: skip


def made(name, **more):
    return getattr(methods, name)(**(GIVEN.get(name, {}) | more))


def run(method):
    model, noise = deep_dit(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    times = [1000 - 1000 * i / STEPS for i in range(STEPS)]
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=times) as steps:
        for i, t in enumerate(times):
            x = (noise * (1 - i / 40)).expand(2, -1, -1, -1)
            model(x, timestep=torch.tensor([int(t)] * 2), class_labels=torch.tensor([1, 1000]))
            steps.step()
        return patch.report().activity[method.name]


def declared(method):
    output = 2 * 8 * 8 * 8 * 4
    return eval(ROWS[type(method).__name__], {"L": DEPTH, "H": H, "O": output, **vars(method)})


@pytest.mark.parametrize("name", ROWS)
def test_the_bytes_held_are_the_declared_ones(name):
    activity = run(made(name))
    assert activity["reused"] + activity.get("in part", 0) > 0
    held, bound = activity["peak bytes"], declared(made(name))
    if name in ("ToCa", "DuCa", "ClusCa"):  # and some numbers for each token or cluster
        assert bound < held < 1.05 * bound
    else:
        assert held == bound


@pytest.mark.parametrize("order", [2, 3])
def test_the_arguments_in_a_formula_count(order):
    method = made("TaylorSeer", order=order)
    assert run(method)["peak bytes"] == declared(method) == (order + 1) * H


@pytest.mark.parametrize(("level", "bound"), [("output", 2 * 8 * 8 * 8 * 4), ("stack", H), ("block", DEPTH * H)])
def test_the_bytes_of_a_level(level, bound):
    assert run(made("FORA", level=level))["peak bytes"] == bound


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 0.5), ("fp16", 0.5), ("fp8", 0.25 + 1 / WIDTH)])
def test_the_bytes_of_a_storage(dtype, share):
    assert run(made("FORA", storage=Storage(dtype=dtype)))["peak bytes"] == share * declared(made("FORA"))


def test_a_bound_that_is_too_small_is_an_error():
    with pytest.raises(ValueError, match=rf"max_bytes={H}, but the features of this model take"):
        run(made("FORA", storage=Storage(max_bytes=H)))


def test_methods_and_kinds_are_on_the_page():
    kinds = {name: getattr(methods, name) for name in methods.PATCHES}
    elsewhere = (SparseAttention, PartialSteps, TokenRoute, methods.ToMe, methods.FastDLLM)
    lossy = {name for name, kind in kinds.items() if kind.kind == "lossy" and not issubclass(kind, elsewhere)}
    assert lossy - set(ROWS) == {"SkipBranches"}
    for name in (*lossy, *KINDS):
        assert f"`{name}`" in PAGE or f'`"{name}"`' in PAGE
        assert name in KINDS or f"::: maskaccel.methods.{name}\n" in PAGE
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in methods.PATCHES)
