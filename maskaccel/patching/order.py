"""One permutation of tokens for a whole stack of blocks, in place of one in every attention.

Everything in a transformer block but attention works on each token by itself, and attention does not mind the order of
its tokens as long as rotary tables, masks and per-token modulation follow. So the latent tokens are put in order where
they enter a run of blocks, whatever else a block is given for each token is put in the same order, and the tokens are
put back where they leave.

There is one owner of the order of a model. A call whose tokens it cannot follow (control residuals, an argument that
could be of text or of latent tokens alike) stays in raster order; methods then order queries and keys by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..masks import TokenOrder
from ..models import stack_of, streams_of
from ..models._attention import derived
from ..models._streams import parameters_of
from .attention import TokenLayout, layout_of
from .patch import Context

ORDER = "_maskaccel_token_order"

PatchOf = Callable[[tuple[int, ...]], "tuple[int, ...] | None"]

_MASK = re.compile(r"mask")
_CONTROL = re.compile(r"control")
_TEXT = re.compile(r"^(encoder|context|txt|text)")


class OrderedStack:
    """The order of one model's tokens.

    Attributes:
        layout: What a call says of its tokens.
        patch_of: The patch of a grid, or None to leave its order.
        calls: Calls of the model that ran in order.
        left: Why the last call did not, or None.
    """

    def __init__(
        self, method: str, layout: TokenLayout, patch_of: PatchOf, grid: tuple[int, ...] | None = None
    ) -> None:
        self.method, self.layout, self.patch_of, self.grid = method, layout, patch_of, grid
        self.calls = 0
        self.left: str | None = None
        self._orders: dict[tuple, TokenOrder] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_orders": {}}

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call of the model begins: tokens are in raster order."""
        self.layout.order = None
        named = dict(zip(self.layout.names, args, strict=False)) | kwargs
        given = [name for name, value in named.items() if _CONTROL.search(name) and value is not None]
        self.left = f"{given[0]} is given, which is in raster order" if given else None

    def enter(self, hidden: Tensor, others: Sequence[Tensor | None]) -> None:
        """A run of blocks begins with these streams."""
        rows = hidden.shape[1]
        grid = self.layout.grid if self.grid is None else self.grid
        if self.left is not None or grid is None:
            return
        patch = self.patch_of(grid)
        if patch is None:
            return
        tokens = 1
        for n in grid:
            tokens *= n
        alike = [other.shape[1] for other in others if other is not None and other.ndim == 3]
        if tokens in (hidden.shape[0], *alike):
            self.left = (
                f"there are as many samples or text tokens as latent ones, {tokens}: tables cannot be told apart"
            )
            return
        beside = rows - tokens
        if beside < 0 or (beside and (self.layout.text not in (None, beside) or self.layout.tokens.text is None)):
            return
        first = self.layout.tokens.text == "first"
        order = self._order(hidden.device, grid, patch, beside if first else 0, 0 if first else beside)
        if not order.is_raster:
            self.layout.order = order

    def _order(self, *key: Any) -> TokenOrder:
        """On a device, so that no call waits for the copy of a permutation."""
        if key not in self._orders:
            self._orders[key] = TokenOrder(*key[1:]).to(key[0])
        return self._orders[key]

    def leave(self) -> TokenOrder | None:
        """The run of blocks ends; the order it ran in."""
        order, self.layout.order = self.layout.order, None
        self.calls += order is not None
        return order

    def inside(self, rows: int) -> TokenOrder | None:
        """The order of a sequence of so many rows: of the latent tokens alone, or with the text beside them."""
        order = self.layout.order
        if order is None or rows == order.tokens:
            return order
        latent = order.tokens - order.prefix - order.suffix
        if rows == latent:
            return self._order(order.permutation.device, order.grid, order.patch, 0, 0)
        text = self.layout.text
        if text is not None and rows == latent + text:
            first = self.layout.tokens.text == "first"
            device, beside = order.permutation.device, (text, 0) if first else (0, text)
            return self._order(device, order.grid, order.patch, *beside)
        return None

    def ordered(self, name: str, value: Any) -> Any:
        """An argument of a block, with what it holds for each latent token in order."""
        if isinstance(value, tuple | list):
            return type(value)(self.ordered(name, part) for part in value)
        if not isinstance(value, Tensor) or (_TEXT.search(name) and not _MASK.search(name)):
            return value
        dims = range(value.ndim if _MASK.search(name) else value.ndim - 1)
        found = [(dim, order) for dim in dims if (order := self.inside(value.shape[dim])) is not None]
        if not found:
            return value
        if len(found) > 1 and not _MASK.search(name):
            raise ValueError(f"{self.method}: the order of tokens cannot follow {name} of shape {tuple(value.shape)}")
        key = f"_maskaccel_{'_'.join(f'{dim}_{order}' for dim, order in found)}"
        return derived(value, key, lambda raster: _applied(raster, found))


def _applied(value: Tensor, found: list[tuple[int, TokenOrder]]) -> Tensor:
    for dim, order in found:
        value = order.apply(value, dim)
    return value


def order_stack(context: Context, method: str, patch_of: PatchOf, grid: tuple[int, ...] | None = None) -> str | None:
    """Plan that a model runs its blocks with tokens in the order of patches.

    Args:
        context: The model.
        method: On whose behalf.
        patch_of: Gives the patch of a grid, or None.
        grid: The grid of the latent tokens, where the user gives it.

    Returns:
        Why the model's blocks stay in raster order, or None if they will be in order.
    """
    try:
        segments = stack_of(context.model).segments
        for block in (block for segment in segments for block in segment):
            streams_of(block)
    except LookupError as error:
        return str(error)
    transaction = context.transaction
    stack = OrderedStack(method, layout_of(context), patch_of, grid)
    transaction.set(context.model, ORDER, stack, method)
    transaction.pre_hook(context.model, stack.begin)
    for segment in segments:
        for block in segment:
            # Around whatever skips blocks: the first puts in order and the last puts back, whether they run or not.
            wrapper = OrderedBlock(stack, block is segment[0], block is segment[-1])
            transaction.wrap_forward(block, wrapper, outermost=True)
    return None


class OrderedBlock:
    """One block of an ordered run, as a wrapper of its forward."""

    def __init__(self, stack: OrderedStack, first: bool, last: bool) -> None:
        self.stack, self.first, self.last = stack, first, last

    def __call__(self, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A call of the block; `inner` is the block itself, or what else stands before it."""
        stack, streams = self.stack, streams_of(block)
        hidden = streams.take(args, kwargs)[0]
        if self.first and hidden is not None:
            stack.enter(hidden, streams.take(args, kwargs)[1:])
        order = stack.layout.order
        if order is None:
            return inner(*args, **kwargs)
        names = streams.inputs
        positions = dict(zip(streams.positions, names, strict=True))
        parameters = parameters_of(type(block))
        moved = [
            value if i in positions else stack.ordered(parameters[i] if i < len(parameters) else "", value)
            for i, value in enumerate(args)
        ]
        named = {name: value if name in names else stack.ordered(name, value) for name, value in kwargs.items()}
        if self.first and hidden is not None:
            start = order.apply(hidden)
            if streams.positions[0] < len(moved):
                moved[streams.positions[0]] = start
            else:
                named[names[0]] = start
        output = inner(*moved, **named)
        if not self.last:
            return output
        stack.leave()
        values = list(streams.read(output))
        if values[0] is not None:
            values[0] = order.undo(values[0])
        if streams.skippable:
            return streams.give(values)
        parts = list(output)
        parts[streams.outputs.index(0)] = values[0]
        return tuple(parts)


def ordered_calls(model: nn.Module) -> OrderedStack | None:
    """The order of a patched model, if it has one."""
    return model.__dict__.get(ORDER)
