"""Steps in part with tokens that a test chooses, and what they have to give, by hand.

The oracle computes every row of the model as it is, without a span: only the attention is given keys and values whose
rows of inactive tokens are those of an earlier call. Rows of active tokens do not see the other rows then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import maskaccel
from maskaccel.masks import DenseAt, TokenIndex
from maskaccel.methods._active import PartialSteps
from maskaccel.patching.attention import AttentionCall, attention_sites, bridge
from maskaccel.patching.partial import active_tokens
from maskaccel.patching.selector import Selector
from maskaccel.state.kv import KVStorage

_POSITIONAL = ("timestep", "ids", "indices", "coords", "pos", "scale", "fps")


class _Given(Selector):
    static = True

    def __init__(self, method: Fixed) -> None:
        self.method = method

    def fixed(self, grid, tokens, device):
        self.method.seen.append((grid, tokens))
        return self.method.choose(tokens)


@dataclass(frozen=True, eq=False)
class Fixed(PartialSteps):
    """Steps in part on the tokens that `choose(tokens)` gives."""

    choose: Any
    storage: KVStorage = KVStorage()
    kernel: bool = False
    seen: Any = None
    grid: Any = None

    name = "Fixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", [])

    @property
    def rule(self) -> DenseAt:
        return DenseAt()

    def selector(self) -> Selector:
        return _Given(self)


def some(tokens: int, batch: int = 1, seed: int = 0, share: float = 0.5) -> TokenIndex:
    """Tokens of each sample, ascending."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randperm(tokens, generator=generator)[: max(1, int(share * tokens))].sort().values for _ in range(batch)
    ]
    return TokenIndex.from_keep(torch.stack(rows), tokens)


def everything(tokens: int) -> TokenIndex:
    return TokenIndex.all(tokens)


def moved(value: Any, step: int) -> Any:
    """The arguments of a later step: latents and times a little further, all else as it was."""
    if isinstance(value, list):
        return [moved(v, step) for v in value]
    return value * (1 - 0.07 * step) + 0.02 * step if isinstance(value, Tensor) and value.is_floating_point() else value


def steps_of(model: nn.Module, kwargs: dict[str, Any], steps: int = 3) -> list[dict[str, Any]]:
    """The arguments of each step."""
    first = next(iter(kwargs))
    times = [name for name in kwargs if name in ("timestep", "timesteps", "t")]
    found = []
    for step in range(steps):
        given = dict(kwargs) | {first: moved(kwargs[first], step)}
        for name in times:
            time = kwargs[name]
            given[name] = time * (1 - 0.1 * step) if time.is_floating_point() else (time - step).clamp(min=0)
        found.append(given)
    return found


def outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    out = model(**given, return_dict=False)
    out = out if isinstance(out, Tensor) else out[0]
    return list(out) if isinstance(out, list) else [out]


@torch.no_grad()
def partial_run(model: nn.Module, method: Any, calls: list[dict[str, Any]], more: tuple = ()) -> tuple[list, dict]:
    """The calls of a run through the patched model, and what the method says of it."""
    found = []
    with maskaccel.patch(model, [method, *more]) as patch, patch.generation(len(calls)) as run:
        for given in calls:
            found.append(outputs(model, given))
            run.step()
        activity = patch.report().activity[method.name]
    return found, activity


def share(activity: dict[str, Any]) -> float:
    """The tokens that calls in part computed."""
    return activity["tokens in part"] / activity["tokens in all"]


class _Stale:
    """A policy: the model's attention, with the rows of inactive tokens from an earlier call."""

    def __init__(self, oracle: StaleAttention) -> None:
        self.oracle, self.held = oracle, {}

    def __call__(self, call: AttentionCall) -> Tensor:
        k, v, active = call.k, call.v, self.oracle.active
        if active is None:
            self.held[call.part] = k.clone(), v.clone()
            return call.dense(mask=self.oracle.keys) if self.oracle.keys is not None else call.dense()
        rows = active.mask
        beside = k.shape[1] - active.n
        text = torch.ones(rows.shape[0], beside, dtype=torch.bool)
        rows = torch.cat([text, rows] if self.oracle.text_first else [rows, text], 1)[:, :, None, None]
        old_k, old_v = self.held[call.part]
        k, v = torch.where(rows, k, old_k), torch.where(rows, v, old_v)
        self.held[call.part] = k, v
        return call.dense(k=k, v=v)


class StaleAttention:
    """The oracle as a method. `active` is the tokens of the next call; None is a dense one, over `keys` if given."""

    kind, models, name = "lossy", "any", "StaleAttention"

    def __init__(self) -> None:
        self.active: TokenIndex | None = None
        self.keys: Tensor | None = None
        self.text_first = False

    def attach(self, context: Any) -> None:
        from maskaccel.models import stack_of

        inside = {id(m) for part in stack_of(context.model).segments for block in part for m in block.modules()}
        for site in attention_sites(context, self.name, ("self", "joint")):
            if id(site.module) in inside:
                bridge(context, self.name, site, _Stale(self))

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return {}


@torch.no_grad()
def oracle_run(
    model: nn.Module, index: TokenIndex, calls: list[dict[str, Any]], text_first: bool
) -> list[list[Tensor]]:
    """The first call dense, the others with these active tokens; outputs of all rows as they come."""
    method = StaleAttention()
    method.text_first = text_first
    found = []
    with maskaccel.patch(model, method):
        for step, given in enumerate(calls):
            method.active = index if step else None
            found.append(outputs(model, given))
    return found


__all__ = ["Fixed", "active_tokens", "everything", "oracle_run", "outputs", "partial_run", "share", "some", "steps_of"]
