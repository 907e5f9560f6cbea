"""The example of masked models: its walks, its loss, its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[1] / "examples" / "masked" / "walks.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("walks", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_walks_take_right_steps(example):
    walks = example.walks(16, 12, torch.Generator().manual_seed(0))
    assert walks.shape == (16, 12) and int(walks.min()) == 0 and int(walks.max()) == 9
    assert example.right_steps(walks) == 1.0
    assert example.right_steps(torch.tensor([[0, 9, 1, 2]])) == pytest.approx(2 / 3)


def test_training_lowers_the_loss(example):
    torch.manual_seed(0)
    model = example.Walker(8, width=32, layers=1)
    with torch.random.fork_rng():
        before = example.train(model, 8, 1, 64, seed=1)
    assert example.train(model, 8, 150, 64, seed=1) < 0.8 * before


def test_every_sampler_makes_walks(example):
    torch.manual_seed(0)
    model = example.Walker(8, width=32, layers=1).eval()
    rows = []
    with torch.no_grad():
        example.table(model, 8, 4, 0, rows.append)
    names = example.samplers(8)
    assert len(rows) == len(names) + 1 and all(name in row for name, row in zip(names, rows[1:], strict=True))


def test_every_cache_makes_walks(example):
    torch.manual_seed(0)
    model = example.Walker(16, width=32, layers=1).eval()
    rows = []
    with torch.no_grad():
        example.cached_table(model, 16, 4, 0, rows.append)
    cells = [row.split("|")[1:4] for row in rows[1:]]
    # 8 calls in four blocks of 4 of 16 tokens.
    assert [(name.strip(), int(calls), float(units)) for name, calls, units in cells] == [
        ("none", 8, 8.0),
        ("prefix", 8, 4 + (16 + 12 + 8 + 4) / 16),
        ("dual", 8, 4 + 4 * 4 / 16),
        ("dual, refreshed every second step", 8, 5.0),
    ]
