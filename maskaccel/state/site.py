"""A remembered module: its output is computed on some steps and forecast from memory on the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks import StepRule
from ..patching.transaction import Transaction
from .feature import Feature, Held, key_of
from .forecast import Forecaster
from .generation import Generation
from .history import Storage

SITE = "_maskaccel_site"


class Refresh(Protocol):
    """What a module does at a step that is computed in part: some tokens anew, the others from memory."""

    def chosen(self, held: Held, x: Tensor) -> Any | None:
        """The tokens that a module of no other argument than x computes; None leaves the call to `__call__`."""

    def __call__(self, site: Site, held: Held, inner: Callable[..., Any], x: Tensor, args: tuple, kwargs: dict) -> Any:
        """The output of the module, or None if this call has to be computed whole."""


class Site:
    """The memory of one module.

    Attributes:
        computed: Calls that ran the module.
        reused: Calls answered from memory.
        refreshed: Calls computed in part.
    """

    def __init__(
        self,
        generation: Generation,
        rule: StepRule,
        forecaster: Forecaster | None = None,
        storage: Storage | None = None,
        refresh: Refresh | None = None,
    ) -> None:
        self.generation, self.rule, self.refresh = generation, rule, refresh
        self.feature = Feature(generation, forecaster, storage)
        self.computed = self.reused = self.refreshed = 0
        self._passes = False  # a fused block calls the module with some tokens

    def key(self, x: Tensor) -> tuple:
        """What has to stay the same for remembered outputs to fit."""
        return key_of(x)

    def recall(self, x: Tensor, own: bool = False, late: bool = False) -> Any | None:
        """The output if this step takes it from memory, else None.

        Args:
            x: The module's input, or something of its shape, dtype and device.
            own: The caller may write to the result; without it, it may be a view of the memory.
            late: The caller takes a `Pending` for a tensor that is a sum.
        """
        if not self.feature.usable():
            return None
        action = self.rule.action(self.generation)
        if action == "compute" or (action == "partial" and self.refresh is not None):
            return None
        held = self.feature.find(self.key(x))
        if held is None:
            return None
        self.reused += 1
        return pytree.tree_unflatten(self.feature.forecast(held, own=own, late=late), held.form)

    def part(self, x: Tensor) -> Part | None:
        """What a fused block needs to compute some tokens of x `(B, N, D)` itself, if this step does so."""
        if self.refresh is None or not self.feature.usable() or self.rule.action(self.generation) != "partial":
            return None
        held = self.feature.find(self.key(x))
        chosen = None if held is None else self.refresh.chosen(held, x)
        return None if held is None or chosen is None else Part(self, held, chosen)

    def store(self, x: Tensor, output: Any) -> None:
        """Remember the output of a computed call."""
        self.computed += 1
        tensors, form = pytree.tree_flatten(output)
        if self.feature.usable() and all(isinstance(t, Tensor) or t is None for t in tensors):
            self.feature.store(self.key(x), tensors, form=form)

    def call(self, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's call: from memory, in part, or computed and remembered."""
        if self._passes:
            return inner(*args, **kwargs)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return inner(*args, **kwargs)
        found = self.recall(x, own=True)  # the caller is not ours and may write to what it gets
        if found is not None:
            return found
        if self.refresh is not None and self.feature.usable() and self.rule.action(self.generation) == "partial":
            held = self.feature.find(self.key(x))
            output = None if held is None else self.refresh(self, held, inner, x, args, kwargs)
            if output is not None:
                self.refreshed += 1
                return output
        output = inner(*args, **kwargs)
        self.store(x, output)
        return output


class Part:
    """A step in part of a module that treats tokens by themselves, in the hands of a fused block."""

    def __init__(self, site: Site, held: Held, chosen: Any) -> None:
        self._site, self._held, self._chosen = site, held, chosen

    @property
    def index(self) -> Tensor:
        """The tokens that are computed, int64 `(B, M)`."""
        return self._chosen.index

    def added(self, module: nn.Module, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """`x + gate * output`, with the module's output for these tokens in it.

        Args:
            module: The module.
            y: Its input for the tokens of `index`, `(B, M, D)`.
            x: Residual stream `(B, N, D)`.
            gate: As in `maskaccel.ops.combine_history`.
        """
        site, chosen = self._site, self._chosen
        site._passes = True
        try:
            fresh = module(y)
        finally:
            site._passes = False
        site.refreshed += 1
        (out,) = site.feature.refresh(
            self._held, fresh, chosen.index, chosen.labels, chosen.gamma, x=x, gate=gate
        )  # fmt: skip
        assert out is not None
        return out


def part_of(module: nn.Module, x: Tensor) -> Part | None:
    """`Site.part` of a module, if it has a site."""
    site = module.__dict__.get(SITE)
    return None if site is None else site.part(x)


def remember(module: nn.Module, site: Site, transaction: Transaction, claimant: str) -> None:
    """Plan that `module` answers from `site` on the steps that reuse it."""
    transaction.set(module, SITE, site, claimant)
    transaction.wrap_forward(module, _remembered_forward)


def recall(module: nn.Module, x: Tensor, late: bool = False) -> Any | None:
    """The remembered output of a module, or None if it has none or this step computes it.

    Fused blocks ask before they prepare the module's input, so that a reused module costs nothing at all. With `late`
    a tensor that is a sum over memory comes as a `Pending`, for a block that adds it in one pass.
    """
    site = module.__dict__.get(SITE)
    return None if site is None else site.recall(x, late=late)


def _remembered_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[SITE].call(inner, args, kwargs)
