"""What methods share that compute some tokens at a step and take the others from memory.

At a step that is computed in part, attention over all tokens is answered from memory, as in the papers' code; modules
that treat every token by itself (MLPs, cross-attention) are called with the chosen tokens alone, and what they return
is written into the value in memory, which then stands for all tokens.

A single-stream block whose MLP and attention share one output projection (`proj_mlp`, `attn`, `proj_out`, as in Flux)
is three modules: attention answered from memory, and both projections called with the chosen tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks import StepRule
from ..models._adapter import children_of
from ..patching.patch import Context
from ..patching.transaction import PatchError, Transaction
from ..state.attention_scores import AttentionScores
from ..state.feature import Held
from ..state.forecast import Forecaster
from ..state.history import Storage
from ..state.select import gathered
from ..state.site import Site
from . import _cached

INSIDE = "_maskaccel_rows"

TEXT_MLPS = ("ff_context", "txt_mlp")

# MLPs in which tokens meet: experts choose their tokens.
_MIXING = ("NucleusMoELayer",)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Parts:
    """The modules of one block.

    Attributes:
        block: The block.
        layer: Its number among all blocks, from 0.
        attention: Modules in which tokens meet, self-attention first: held at steps in part.
        rows: Modules that treat each token by itself, with their kind (`"mlp"`, `"text"`, `"cross"`, `"single"`).
        inside: The first projection of a single-stream block's MLP.
    """

    block: nn.Module
    layer: int
    attention: list[nn.Module] = field(default_factory=list)
    rows: list[tuple[nn.Module, str]] = field(default_factory=list)
    inside: nn.Module | None = None

    def only(self, kind: str) -> nn.Module | None:
        """The first module of a kind."""
        return next((module for module, found in self.rows if found == kind), None)


def parts_of(method: _cached.Named, context: Context) -> list[Parts]:
    """The modules of every block.

    Raises:
        PatchError: No block has a module that treats tokens by themselves.
    """
    blocks = [block for children in _cached.block_lists(context.model) for block in children]
    found = []
    for layer, block in enumerate(blocks):
        parts = Parts(block, layer, children_of(block, _cached.SELF_ATTENTION))
        single = children_of(block, ("proj_mlp", "proj_out"))
        if len(single) == 2 and parts.attention:
            parts.inside, parts.rows = single[0], [(single[1], "single")]
        for module in children_of(block, _cached.CROSS_ATTENTION):
            # A second self-attention (SD3.5) says of itself that it attends to no other stream.
            if getattr(module, "is_cross_attention", True):
                parts.rows.append((module, "cross"))
            else:
                parts.attention.append(module)
        for name in _cached.MLPS:
            for module in children_of(block, (name,)):
                if _mixes(module):
                    parts.attention.append(module)
                else:
                    parts.rows.append((module, "text" if name in TEXT_MLPS else "mlp"))
        if not parts.rows:
            context.skip(method.name, block, "it has no module that treats every token by itself")
        found.append(parts)
    if not any(parts.rows for parts in found):
        raise PatchError(f"{method.name}: {type(context.model).__name__} has no blocks with an MLP that it knows")
    return found


def _mixes(mlp: nn.Module) -> bool:
    """Whether an MLP computes a token from others too."""
    return any(
        type(m).__name__ in _MIXING or (isinstance(m, _CONVOLUTIONS) and any(n > 1 for n in m.kernel_size))
        for m in mlp.modules()
    )


class Choice(Protocol):
    """Which tokens of one module are computed at a step in part."""

    def __call__(self, x: Tensor, held: Held | None) -> Choices | None:
        """The choice for the module's input x `(B, N, D)`; None takes all tokens from memory."""


@dataclass
class Choices:
    """Chosen tokens.

    Attributes:
        index: Which, int64 `(B, M)`; equal ones are computed alike.
        labels: Cluster of every token, int64 `(B, N)`, where tokens of a cluster take part in what is chosen of it.
        gamma: Share that they take.
    """

    index: Tensor
    labels: Tensor | None = None
    gamma: float = 0.0


@dataclass
class Rows:
    """What a module that treats tokens by themselves does at a step in part (a `state.site.Refresh`).

    Attributes:
        choice: Which tokens are computed.
        scores: Scores that the module's own calls give, told which tokens they are of.
    """

    choice: Choice
    scores: AttentionScores | None = None

    def chosen(self, held: Held, x: Tensor) -> Choices | None:
        """The tokens that a module of no other argument than x computes; None leaves the call to `__call__`."""
        if self.scores is not None or not _fits(held, x):
            return None
        # A sum with values of another dtype may be of another dtype than x; a projection changes the width alone.
        history = held.groups[0][0]
        return self.choice(x, held) if history is not None and history.of_kind(x, any_width=True) else None

    def __call__(self, site: Site, held: Held, inner: Callable[..., Any], x: Tensor, args: tuple, kwargs: dict) -> Any:
        """The output of the module, or None if it has to be computed whole."""
        if not _fits(held, x) or not by_rows(x, args, kwargs):
            return None
        chosen = self.choice(x, held)
        if chosen is None:
            return pytree.tree_unflatten(site.feature.forecast(held), held.form)
        rows = gathered(x, chosen.index)
        if self.scores is not None:
            self.scores.rows = chosen.index
        try:
            fresh = inner(
                *(rows if a is x else a for a in args), **{k: rows if v is x else v for k, v in kwargs.items()}
            )
        finally:
            if self.scores is not None:
                self.scores.rows = None
        (fresh,) = pytree.tree_leaves(fresh)
        out = site.feature.refresh(held, fresh, chosen.index, chosen.labels, chosen.gamma)
        return pytree.tree_unflatten(out, held.form)


def _fits(held: Held, x: Tensor) -> bool:
    """Whether what is held is one value for each token of x."""
    values = held.groups[0]
    return x.dim() == 3 and len(values) == 1 and values[0] is not None


def by_rows(x: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether nothing else in a module's arguments belongs to single tokens of x `(B, N, D)`.

    What cross-attention attends to does not, nor does a mask over it; a mask over pairs and a rotary embedding do.
    """
    named = [*((None if i > 1 else "encoder_hidden_states", a) for i, a in enumerate(args)), *kwargs.items()]
    for name, value in named:
        if value is x or name == "encoder_hidden_states":
            continue
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            return False
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if name is not None and "rotary" in name:
            return False
        if x.shape[1] in (value.shape[0], *value.shape[1:-1]):
            return False
    return True


@dataclass(eq=False)
class Inside:
    """The first projection of a single-stream block: only the rows that the last one is called with are computed.

    Attributes:
        site: Of the last projection.
        choice: The choice that both share.
    """

    site: Site
    choice: Choice

    def call(self, inner: Callable[..., Any], x: Tensor) -> Tensor:
        """The projection; at a step in part with zeros in the rows that nobody reads."""
        site = self.site
        if x.dim() != 3 or site.rule.action(site.generation) != "partial" or not site.feature.fits(x):
            return inner(x)
        chosen = self.choice(x, site.feature.peek())
        index = torch.zeros_like(x[:, :1, 0], dtype=torch.int64) if chosen is None else chosen.index
        fresh = inner(gathered(x, index))
        out = fresh.new_zeros(*x.shape[:2], fresh.shape[-1])
        return out.scatter_(1, index.unsqueeze(-1).expand_as(fresh), fresh)

    def attach(self, module: nn.Module, transaction: Transaction, claimant: str) -> None:
        """Plan it for `module`."""
        transaction.set(module, INSIDE, self, claimant)
        transaction.wrap_forward(module, _inside_forward)


def _inside_forward(self: nn.Module, inner: Callable[..., Any], /, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return inner(x, *args, **kwargs) if args or kwargs else self.__dict__[INSIDE].call(inner, x)


def attach_parts(
    method: _cached.Named,
    context: Context,
    parts: Parts,
    rule: StepRule,
    choose: Callable[[nn.Module, str], Choice | None],
    forecaster: Forecaster | None = None,
    storage: Storage | None = None,
    scores: dict[int, AttentionScores] | None = None,
) -> None:
    """Plan the memories of one block.

    Args:
        method: On whose behalf.
        context: The model.
        parts: The block.
        rule: The step mask, with steps in part.
        choose: The choice for a module of a kind; None holds it at steps in part.
        forecaster: Of what is remembered; None holds the last value.
        storage: How it is kept.
        scores: By `id` of attention modules, the scores that they give.
    """
    scores = scores or {}
    held = parts.attention if parts.inside is None or choose(parts.rows[0][0], "single") is not None else []
    _cached.remember_modules(method, context, held, rule, forecaster, storage, "held at steps in part")
    for module, kind in parts.rows:
        choice = choose(module, kind)
        if choice is None:
            _cached.remember_modules(method, context, [module], rule, forecaster, storage, "held at steps in part")
            continue
        refresh = Rows(choice, scores.get(id(module)))
        (site,) = _cached.remember_modules(
            method, context, [module], rule, forecaster, storage, "some tokens at steps in part", refresh
        )
        if parts.inside is not None and kind == "single":
            Inside(site, choice).attach(parts.inside, context.transaction, method.name)
            context.done(method.name, parts.inside, "some tokens at steps in part")
    for module in [*parts.attention, *(m for m, _ in parts.rows)]:
        if id(module) in scores:
            scores[id(module)].attach(module, context.transaction, method.name)
