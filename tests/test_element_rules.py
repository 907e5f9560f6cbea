"""Element rules and windows: tiles made from a rule are exactly the dense predicate, written here pair by pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel.masks import Causal, Dense, GridWindow, Lengths, Segments, TileMask, TokenOrder, varlen
from maskaccel.masks.rules import ALL, ALWAYS, NEVER, NONE, WHERE

GRIDS = [(8, 8), (7, 9), (12,), (3, 5, 6), (1, 4, 4), (5, 1, 3)]
PATCHES = {1: (5,), 2: (4, 4), 3: (2, 2, 4)}


def places(order: TokenOrder) -> list[tuple[int, ...] | None]:
    """Where each token is, independent of the library: patches in raster order, tokens of each in raster order."""
    grid, patch = order.grid, order.patch or order.grid
    cells = sorted(
        itertools.product(*map(range, grid)),
        key=lambda c: (tuple(x // p for x, p in zip(c, patch, strict=True)), c),
    )
    return [None] * order.prefix + cells + [None] * order.suffix


def dense(order: TokenOrder, near, outside: bool = True) -> torch.Tensor:
    """The predicate for every pair."""
    at = places(order)
    return torch.tensor([[outside if a is None or b is None else near(a, b) for b in at] for a in at])


@st.composite
def orders(draw) -> TokenOrder:
    grid = draw(st.sampled_from(GRIDS))
    patch = draw(st.sampled_from([None, PATCHES[len(grid)]]))
    return TokenOrder(grid, patch, *draw(st.sampled_from([(0, 0), (5, 0), (0, 3), (2, 4)])))


BLOCKS = st.sampled_from([(16, 32), (32, 64), (48, 32)])


def check(rule, want: torch.Tensor, block: tuple[int, int]) -> None:
    """The mask is the predicate; tiles are none, part or full as their elements are; summaries do not lie."""
    want = want[(None,) * (4 - want.dim())]
    shape = tuple(want.shape[-2:])
    mask = TileMask.from_rule(rule, shape, block)
    assert torch.equal(mask.to_bool().expand(want.shape), want)
    exact = TileMask.from_bool(want, block)
    assert torch.equal(mask.tiles().expand(exact.tiles().shape), exact.tiles())
    partial = [torch.zeros(1) if m.pattern_of is None else (m.pattern_of >= 0) & m.tiles() for m in (mask, exact)]
    assert int(partial[0].sum()) * exact.batch * exact.heads == int(partial[1].sum()) * mask.batch * mask.heads
    rows = torch.arange(mask.rows * block[0]).clamp(max=shape[0] - 1).view(-1, block[0])
    columns = torch.arange(mask.columns * block[1]).clamp(max=shape[1] - 1).view(-1, block[1])
    kind = rule.classify(rows, columns)
    assert not (mask.tiles() & (kind == NONE)).any()
    assert mask.tiles()[(kind == ALL).expand(mask.tiles().shape)].all()


@settings(max_examples=60, deadline=None)
@given(orders(), BLOCKS, st.sampled_from([0.5, 1, 2, 2.5, 3, 100]), st.booleans(), st.booleans())
def test_disc(order, block, radius, strict, outside) -> None:
    def near(a, b):
        d = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
        return d < radius**2 if strict else d <= radius**2

    rule = GridWindow(order, radius, "euclid", strict=strict, outside=outside)
    check(rule, dense(order, near, outside), block)
    if strict:  # CLEAR's is strict
        check(GridWindow(order, radius, "euclid", outside=outside), dense(order, near, outside), block)


@settings(max_examples=60, deadline=None)
@given(orders(), BLOCKS, st.data())
def test_box(order, block, data) -> None:
    axes = len(order.grid)
    radius = tuple(data.draw(st.sampled_from([None, 0, 1, 2])) for _ in range(axes))
    dilation = tuple(data.draw(st.sampled_from([1, 1, 2, 3])) for _ in range(axes))

    def near(a, b):
        return all(
            (x - y) % d == 0 and (r is None or abs(x - y) <= r * d)
            for x, y, r, d in zip(a, b, radius, dilation, strict=True)
        )

    check(GridWindow(order, radius, dilation=dilation), dense(order, near), block)


@settings(max_examples=60, deadline=None)
@given(orders(), BLOCKS, st.integers(0, 3), st.integers(1, 3))
def test_clamped_centres(order, block, radius, dilation) -> None:
    """Each axis: the tokens of one's own residue, the 2 r + 1 of them nearest that fit in the grid."""

    def seen(x: int, n: int) -> set[int]:
        fellows = list(range(x % dilation, n, dilation))
        size = min(2 * radius + 1, len(fellows))
        start = min(max(fellows.index(x) - radius, 0), len(fellows) - size)
        return set(fellows[start : start + size])

    def near(a, b):
        return all(y in seen(x, n) for x, y, n in zip(a, b, order.grid, strict=True))

    check(GridWindow(order, radius, clamp=True, dilation=dilation), dense(order, near), block)


@settings(max_examples=40, deadline=None)
@given(orders(), BLOCKS, st.integers(0, 9))
def test_band(order, block, radius) -> None:
    def index(a):
        return sum(x * math.prod(order.grid[i + 1 :]) for i, x in enumerate(a))

    check(GridWindow(order, radius, "band"), dense(order, lambda a, b: abs(index(a) - index(b)) <= radius), block)


@settings(max_examples=60, deadline=None)
@given(orders(), BLOCKS, st.integers(0, 1), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_units(order, block, radius, unit, shift, clamp) -> None:
    """Windows of whole blocks: Swin (radius 0, shifted), sliding tiles (clamped)."""

    def unit_of(a):
        return [(x + shift) // unit for x in a]

    def near(a, b):
        counts = [(n - 1 + shift) // unit - shift // unit + 1 for n in order.grid]
        for x, y, n in zip(unit_of(a), unit_of(b), counts, strict=True):
            x, y = x - shift // unit, y - shift // unit
            centre = min(max(x, radius), max(n - 1 - radius, radius)) if clamp else x
            if abs(centre - y) > radius:
                return False
        return True

    check(GridWindow(order, radius, unit=unit, shift=shift, clamp=clamp), dense(order, near), block)


def test_keys_elsewhere_on_the_grid() -> None:
    order, keys = TokenOrder((4, 6), (2, 2)), TokenOrder((4, 6), None, prefix=3)
    q, k = places(order), places(keys)
    want = torch.tensor([[b is None or max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1 for b in k] for a in q])
    check(GridWindow(order, 1, keys=keys), want, (16, 32))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), BLOCKS, st.booleans())
def test_segments(seed, block, batched) -> None:
    generator = torch.Generator().manual_seed(seed)
    sq, sk, classes = 70, 90, 4
    lead = (3,) if batched else ()
    q = torch.randint(0, classes, (*lead, sq), generator=generator).sort(-1).values
    k = torch.randint(0, classes, (*lead, sk), generator=generator).sort(-1).values
    check(Segments(q, k), (q[..., :, None] == k[..., None, :]).reshape(-1, 1, sq, sk), block)
    relation = torch.randint(0, 3, (classes, classes), generator=generator)
    where = Causal(10)
    kind = relation[q[..., :, None], k[..., None, :]].reshape(-1, 1, sq, sk)
    causal = torch.arange(sk) <= torch.arange(sq)[:, None] + 10
    want = (kind == ALWAYS) | ((kind == WHERE) & causal)
    check(Segments(q, k, relation, where), want, block)
    assert not (want & (kind == NEVER)).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), BLOCKS)
def test_lengths_causal_dense_and_combinations(seed, block) -> None:
    generator = torch.Generator().manual_seed(seed)
    sq, sk = 75, 100
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    kv, q = torch.randint(0, sk + 1, (2,), generator=generator), torch.randint(0, sq + 1, (2,), generator=generator)
    padded = (j < kv[:, None, None, None]) & (i < q[:, None, None, None])
    check(Lengths(kv, q), padded, block)
    check(Causal(-7), (j <= i - 7)[None, None], block)
    any_mask = torch.rand(1, 3, sq, sk, generator=generator) < 0.5
    check(Dense(any_mask), any_mask, block)
    check(Lengths(kv) & Dense(any_mask), (j < kv[:, None, None, None]) & any_mask, block)
    check(Causal() | Lengths(kv, q), (j <= i) | padded, block)
    check(~(Causal() & ~Dense(any_mask)), ~((j <= i) & ~any_mask), block)


def test_packed_samples() -> None:
    rule = varlen([0, 30, 30, 80], [0, 10, 20, 64])
    want = torch.zeros(80, 64, dtype=torch.bool)
    want[:30, :10] = True
    want[30:80, 20:64] = True
    check(rule, want, (16, 32))


@settings(max_examples=60, deadline=None)
@given(orders())
def test_orders(order) -> None:
    x = torch.arange(order.tokens)[None, :, None]
    moved = order.apply(x)
    assert torch.equal(order.undo(moved), x)
    cells = {place: n + order.prefix for n, place in enumerate(itertools.product(*map(range, order.grid)))}
    want = [cells[p] if p is not None else None for p in places(order)]
    for row, cell in zip(moved.flatten().tolist(), want, strict=True):
        assert cell is None or row == cell
    for row, place in zip(order.coordinates.tolist(), places(order), strict=True):
        assert tuple(row) == (place if place is not None else (-1,) * len(order.grid))
    if order.is_raster:
        assert torch.equal(moved, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileMask.from_rule(GridWindow(TokenOrder((8, 8)), 2), (64, 65)), r"64 tokens; there are 65 keys"),
        (lambda: GridWindow(TokenOrder((8, 8)), (1, 2, 3)), "one for each of the grid's 2 axes"),
        (lambda: GridWindow(TokenOrder((8, 8)), math.nan), "radius=nan"),
        (lambda: GridWindow(TokenOrder((8, 8)), -1), "radius=-1"),
        (lambda: GridWindow(TokenOrder((8, 8)), 1, "manhattan"), "metric='manhattan'"),
        (lambda: GridWindow(TokenOrder((8, 8)), 1, "euclid", clamp=True), "clamp and dilation are for metric='box'"),
        (lambda: GridWindow(TokenOrder((8, 8)), 1.5, clamp=True), "whole where the centre is clamped"),
        (lambda: GridWindow(TokenOrder((8, 8)), 1, keys=TokenOrder((8, 9))), r"keys are on the grid \(8, 9\)"),
        (lambda: TokenOrder((8, 0)), "grid=.*8, 0"),
        (lambda: TokenOrder((8, 8), (4,)), "patch=.*must be 2 sizes"),
        (lambda: TokenOrder((8, 8), prefix=-1), "prefix=-1"),
        (lambda: TokenOrder((8, 8)).apply(torch.zeros(1, 65, 2)), "65 rows; the order has 64"),
        (lambda: Lengths(torch.tensor([5, -1])), "holds -1"),
        (lambda: Lengths(), "kv or q"),
        (lambda: TileMask.from_rule(Lengths(torch.tensor([65])), (64, 64)), "kv holds 65; the sequence has 64"),
        (lambda: Segments(torch.zeros(4), torch.zeros(4)), "must be integers"),
        (lambda: Segments(torch.tensor([0, 5]), torch.tensor([0, 1]), [[1, 0], [0, 1]]), "classes 0 to 5.*0 to 1"),
        (lambda: Segments(torch.tensor([0]), torch.tensor([0]), [[3]]), "table of 0"),
        (lambda: Segments(torch.tensor([0]), torch.tensor([0]), [[2]]), "needs the rule"),
        (lambda: TileMask.from_rule(Segments(torch.zeros(4).long(), torch.zeros(4).long()), (5, 4)), "5 tokens"),
        (lambda: varlen([0, 5, 3], [0, 1, 2]), "not decrease"),
        (lambda: varlen([0, 5], [0, 1, 2]), "different numbers"),
        (lambda: Dense(torch.zeros(4, 4)), "mask must be bool"),
        (lambda: Lengths(torch.tensor([1, 2])) & Lengths(torch.tensor([1, 2, 3])), "2 and for 3 samples"),
    ],
)
def test_bad_rules_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
