"""Blocks without attention: convolutions over a grid (DiC, DiCo) and a scan along the tokens (DiffuSSM, DiM, RWKV).

Methods that work on lists of blocks serve them: caching on both, routing where blocks take tokens in their order.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo.common import made, randn

import maskaccel
from maskaccel import TokenRoute
from maskaccel.methods import FORA, SCM, DBCache, FBCache, FoCa, MagCache, SkipBranches, SkipCache, TaylorSeer
from maskaccel.state import Taylor

STEPS, WIDTH, DEPTH = 6, 16, 4


class ConvBlock(nn.Module):
    """A depthwise convolution under adaLN over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation, self.mix = nn.Linear(width, 3 * width), nn.Conv2d(width, width, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c)[:, :, None, None].chunk(3, dim=1)
        y = functional.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1) * (1 + scale) + shift
        return x + gate * self.mix(functional.gelu(self.conv(y)))


class ScanBlock(nn.Module):
    """A state that runs along the tokens: what a token gets depends on all before it, and on their order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation, self.enter = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.decay, self.leave = nn.Parameter(torch.zeros(width)), nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.seen = x.detach()
        shift, scale, gate = self.modulation(c)[:, None].chunk(3, dim=-1)
        y = self.enter(functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        state, states = torch.zeros_like(y[:, 0]), []
        for token in y.unbind(dim=1):
            state = torch.sigmoid(self.decay) * state + token
            states.append(state)
        return x + gate * self.leave(torch.stack(states, dim=1))


class Net(nn.Module):
    """A list of blocks between two layers."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = 2 * x
        for block in self.blocks:
            x = block(x, c)
        return x.sin()


SHAPES = {ConvBlock: (2, WIDTH, 6, 5), ScanBlock: (2, 12, WIDTH)}
BLOCKS = pytest.mark.parametrize("block", SHAPES, ids=lambda block: block.__name__)


def inputs(block: type[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Latents and conditions that move along a line."""
    start, move, c = randn(*SHAPES[block]), randn(*SHAPES[block], seed=1), randn(2, WIDTH, seed=2)
    return [(start + 0.1 * i * move, c * (1 - 0.05 * i)) for i in range(STEPS)]


@torch.no_grad()
def patched(model: nn.Module, method: object, calls: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], dict]:
    outs = []
    timesteps = torch.linspace(900, 100, STEPS)
    with maskaccel.patch(model, method) as patch, patch.generation(STEPS, timesteps=timesteps) as run:
        for x, c in calls:
            outs.append(model(x, c))
            run.step()
        activity = next(iter(patch.report().activity.values()))
    return outs, activity


@BLOCKS
@pytest.mark.filterwarnings("ignore:.*never reuse")
@pytest.mark.parametrize(
    "method",
    [
        FORA(interval=1, level="stack"), TaylorSeer(interval=1), FoCa(interval=1), SCM(policy=(1,) * STEPS),
        MagCache(ratios=(1.0,) * STEPS, retention=1.0), FBCache(threshold=0.0), DBCache(threshold=0.0, lead=1, first=1),
        SkipCache(interval=1, outer=1),
    ],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_computing_always_is_the_model(block, method) -> None:
    model, calls = made(Net, block=block), inputs(block)
    with torch.no_grad():
        want = [model(x, c) for x, c in calls]
    got, _ = patched(model, method, calls)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*never reuse")
def test_untrained_skip_branches_change_nothing() -> None:
    model, calls = made(Net, block=ScanBlock), inputs(ScanBlock)
    with torch.no_grad():
        want = [model(x, c) for x, c in calls]
    got, _ = patched(model, [SkipCache(interval=1, outer=1), SkipBranches(WIDTH, DEPTH)], calls)
    assert all(map(torch.equal, got, want))


@BLOCKS
@pytest.mark.parametrize("order", [0, 1])
def test_a_skipped_stack_adds_what_its_last_steps_foretell(block, order) -> None:
    """Against a plain loop: the update of all blocks at computed steps, held or carried on along a line."""
    model, calls = made(Net, block=block), inputs(block)
    method = FORA(interval=2, level="stack") if order == 0 else SCM(policy=(1, 1, 0, 1, 0, 0), forecaster=Taylor(1))
    computes = [i % 2 == 0 for i in range(STEPS)] if order == 0 else [True, True, False, True, False, False]
    want, known = [], []
    with torch.no_grad():
        for step, (x, c) in enumerate(calls):
            hidden = 2 * x
            if computes[step]:
                for b in model.blocks:
                    hidden = b(hidden, c)
                known.append((step, hidden - 2 * x))
                want.append(hidden.sin())
                continue
            at, last = known[-1]
            slope = (last - known[-2][1]) / (at - known[-2][0]) if order else torch.zeros_like(last)
            want.append((hidden + last + slope * (step - at)).sin())
    got, activity = patched(model, method, calls)
    assert activity["computed"] == sum(computes) and activity["reused"] == STEPS - sum(computes)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_scan_sees_kept_tokens_in_their_order() -> None:
    """A route gives the blocks of its span the kept tokens from the first to the last, whatever drew them."""
    model = made(Net, block=ScanBlock).train()
    x, c = inputs(ScanBlock)[0]
    with maskaccel.patch(model, TokenRoute(1, -2, 0.5)):
        got = model(x, c)
    seen = model.blocks[1].seen
    before = model.blocks[0](2 * x, c)
    places = [[int(torch.where((before[b] == row).all(-1))[0]) for row in seen[b]] for b in range(2)]
    assert all(ids == sorted(set(ids)) and len(ids) == 6 for ids in places) and places[0] != places[1]
    index = torch.tensor(places).unsqueeze(-1).expand(-1, -1, WIDTH)
    middle = model.blocks[2](model.blocks[1](before.gather(1, index), c), c)
    want = model.blocks[3](before.scatter(1, index, middle), c).sin()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_convolutions_cannot_run_on_some_of_the_tokens() -> None:
    model = made(Net, block=ConvBlock).train()
    with pytest.raises(maskaccel.PatchError, match="convolves over the grid"):
        maskaccel.patch(model, TokenRoute(1, -2, 0.5))
