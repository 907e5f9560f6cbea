"""The page of systems: its names exist, its tests use them; and masks of language and autoregressive models on it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from zoo.common import randn

import maskaccel
from maskaccel import methods, ops
from maskaccel.masks import Causal, GridWindow, Rule, Segments, TileMask, TokenOrder

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "systems.md"
WHERE = {"ops": ops, "masks": maskaccel.masks}


def rows() -> list[tuple[str, list[str], list[str]]]:
    """System, names of what to use, and test files of each row."""
    found = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| system"):
            system, use, tests = (cell.strip() for cell in line.strip("| ").split(" | "))
            found.append((system, re.findall(r"`([\w.]+)`", use), re.findall(r"`(\w+)`", tests)))
    return found


@pytest.mark.parametrize(("system", "names", "tests"), rows(), ids=[row[0] for row in rows()])
def test_a_row_names_what_exists_and_tests_that_use_it(system, names, tests) -> None:
    text = "".join((TESTS / f"{test}.py").read_text() for test in tests)
    assert tests, "a row without a test"
    for name in names:
        module, _, attribute = name.rpartition(".")
        owner = WHERE[module] if module else (maskaccel if name == "TokenRoute" else methods)
        assert hasattr(owner, attribute), f"{system}: there is no {name}"
        assert re.search(rf"\b{attribute}\b", text), f"{system}: none of {tests} uses {name}"


def masked_dense(q, k, v, keep):
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(*heads_first, attn_mask=keep).transpose(1, 2)


def check(rule: Rule, keep: torch.Tensor) -> TileMask:
    """Attention over the tiles of a rule is attention under the mask `keep`."""
    n = keep.shape[0]
    mask = TileMask.from_rule(rule, (n, n), (64, 64))
    assert torch.equal(mask.to_bool().expand(1, 1, n, n)[0, 0], keep)
    q, k, v = (randn(2, n, 2, 32, seed=i) for i in range(3))
    torch.testing.assert_close(ops.tile_attention(q, k, v, mask), masked_dense(q, k, v, keep), rtol=1e-4, atol=1e-5)
    return mask


def test_windows_keep_the_sinks() -> None:
    """A window over text, and sinks for all, wherever they are (those of diffusion language models move)."""
    n, sinks = 300, [0, 1, 170]
    place = torch.arange(n)
    near = (place[:, None] - place).abs() <= 20
    keep = near.clone()
    keep[:, sinks] = True
    is_sink = torch.zeros(n, dtype=torch.int64)
    is_sink[sinks] = 1
    everybody = Segments(torch.zeros(n, dtype=torch.int64), is_sink, torch.tensor([[False, True]]))
    assert check(GridWindow(TokenOrder((n,)), radius=20) | everybody, keep).density() < 1


def test_causal_text_and_images_that_see_themselves() -> None:
    """MonoFormer: text is causal, an image sees all of itself and what comes before it."""
    n, image = 200, slice(70, 150)
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    keep[image, image] = True
    part = torch.zeros(n, dtype=torch.int64)
    part[image] = 1
    check(Causal() | Segments(part, part, torch.tensor([[False, False], [False, True]])), keep)


def test_permuted_causal_attention() -> None:
    """RAR: tokens of an image in a random order, each seeing those before it in that order."""
    n = 160
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n)
    keep = rank[:, None] >= rank
    q, k, v = (randn(2, n, 2, 32, seed=i) for i in range(3))
    mask = TileMask.from_rule(Causal(), (n, n), (64, 64))
    got = ops.tile_attention(*(t[:, order] for t in (q, k, v)), mask)[:, rank]
    torch.testing.assert_close(got, masked_dense(q, k, v, keep), rtol=1e-4, atol=1e-5)


def test_blocks_of_text() -> None:
    """Blocks see themselves and those before: what a masked model of text needs to remember keys and values."""
    n, block = 192, 32
    part = torch.arange(n) // block
    keep = part[:, None] >= part
    relation = torch.ones(n // block, n // block, dtype=torch.bool).tril()
    mask = check(Segments(part, part, relation), keep)
    assert mask.density() < 0.8
