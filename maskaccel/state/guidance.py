"""Guidance whose unconditional branch is remembered: as its difference from the conditional one, in two bands.

The difference of a step that computes both branches is split into a low and a high band of its spatial frequencies. On
a step that skips the unconditional branch, its output is the conditional output plus the sum of the two, each times a
factor. Everything is linear, so the bands are kept in space and a skipped step needs no transform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks import StepRule
from ..masks.schedule import Position
from ..patching.transaction import Transaction
from ._rows import as_named, cut_batch
from .feature import Feature, key_of
from .forecast import Forecaster
from .generation import Generation
from .history import Storage
from .site import Site

GUIDANCE = "_maskaccel_guidance"
# Names by which diffusers' pipelines call the two branches where each has a call of its own.
_ROLES = {"cond": "cond", "uncond": "uncond"}
_OTHER = {"cond": "uncond", "uncond": "cond"}


@dataclass
class _Seen:
    """The output of one branch, computed at a step."""

    step: int
    key: tuple
    tensors: list[Tensor | None]
    form: Any


@dataclass
class _Split:
    """How the output of a call with both branches in one batch falls into branches."""

    form: Any
    listed: bool  # a list of samples, instead of tensors with a batch dim


class Guidance:
    """What a model remembers of the difference of its guidance branches.

    Branches are told apart by the name of their call (`"cond"`, `"uncond"`), or are the halves of a batch whose first
    input is the same in both halves; anything else is no guidance, and is computed.

    Attributes:
        whole: The call at hand belongs to a step that computes both branches.
        paired: The call at hand holds both branches, or the conditional half of such a batch.
        computed: Times the unconditional branch was computed.
        reused: Times it was not.
        features: Memories inside the model that have to be dropped when a batch turns out to be no guidance.
    """

    def __init__(
        self,
        generation: Generation,
        rule: StepRule,
        growth: Callable[[Position], tuple[float, float]],
        *,
        cond_first: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Make a memory.

        Args:
            generation: The model's run.
            rule: When the unconditional branch is computed.
            growth: Factors of the low and the high band of one more skipped step.
            cond_first: The conditional half of a batch comes first.
            grid: Rows and columns of outputs that are lists of tokens.
        """
        self.generation, self.rule, self.growth, self.cond_first, self.grid = generation, rule, growth, cond_first, grid
        self.whole = self.paired = False
        self.computed = self.reused = 0
        self.features: list[Feature] = []
        generation.memories.append(self)
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts without what the original remembers.
        fresh: dict[str, Any] = {"_bands": None, "_seen": {}, "_split": None, "_pairs": {}, "_pair": None}
        return {**self.__dict__, **fresh}

    def clear(self) -> None:
        """Forget everything."""
        self._bands: list[Tensor | None] | None = None  # (2, ...) of each tensor: low and high
        self._factors, self._grown = (1.0, 1.0), -1
        self._seen: dict[str, _Seen] = {}
        self._split: _Split | None = None
        self._pairs: dict[tuple, bool] = {}  # calls, by branch and shape, that were looked at
        self._pair: tuple | None = None  # the one whose bands are held

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        held = [*(self._bands or []), *(t for seen in self._seen.values() for t in seen.tensors)]
        return sum(t.nbytes for t in held if t is not None)

    def call(self, model: nn.Module, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The model's call."""
        self.whole = self.paired = False
        if not self.generation.active or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        named = as_named(model, args, kwargs)
        first = next((v for v in named.values() if (isinstance(v, Tensor) and v.dim()) or _samples(v)), None)
        if first is None:
            return inner(*args, **kwargs)
        role = _ROLES.get(self.generation.branch_key)
        if role is not None:
            return self._named(role, first, named, inner, args, kwargs)
        return self._batched(model, first, named, inner, args, kwargs)

    # ------------------------------------------------------------------------------------ one call for each branch
    def _named(
        self, role: str, first: Any, named: dict[str, Any], inner: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        step, key = self.generation.index, _key(first)
        self.whole = self.rule.action(self.generation) == "compute"
        cond = self._seen.get("cond")
        current = cond is not None and cond.step == step and cond.key == key
        if role == "uncond" and not self.whole and cond is not None and current and self._fits(cond.tensors):
            self.reused += 1
            return pytree.tree_unflatten(self._forecast(cond.tensors), cond.form)
        output = inner(*args, **kwargs)
        self.computed += role == "uncond"
        tensors, form = pytree.tree_flatten(output)
        if not all(t is None or isinstance(t, Tensor) for t in tensors):
            return output
        # Copies: the pipeline owns the output and may write to it.
        self._seen[role] = _Seen(step, key, [None if t is None else t.clone() for t in tensors], form)
        other = self._seen.get(_OTHER[role])
        if other is not None and other.step == step and other.key == key:
            self._remember(self._seen["cond"].tensors, self._seen["uncond"].tensors, named)
        return output

    # ------------------------------------------------------------------------------------ both branches in a batch
    def _batched(
        self,
        model: nn.Module,
        first: Any,
        named: dict[str, Any],
        inner: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        batch, which = len(first), (self.generation.branch_key, _key(first))
        self.paired = self._is_pair(which, model, first, args, kwargs)
        if not self.paired:
            return inner(*args, **kwargs)
        known = self._bands is not None and self._pair == which
        skipping = known and self.rule.action(self.generation) != "compute"
        picked = cut_batch(model, args, kwargs, batch, self.rows(batch)) if skipping else None
        if picked is None:
            self.whole = True
            self.computed += 1
            output = inner(*args, **kwargs)
            self._learn(which, output, first, named)
            return output
        tensors, _ = pytree.tree_flatten(inner(*picked[0], **picked[1]))
        split = self._split
        assert split is not None
        self.reused += 1
        other = self._forecast(tensors)
        order = (tensors, other) if self.cond_first else (other, tensors)
        if split.listed:
            return pytree.tree_unflatten([*order[0], *order[1]], split.form)
        joined = [a if a is None else torch.cat([a, b]) for a, b in zip(*order, strict=True)]
        return pytree.tree_unflatten(joined, split.form)

    def rows(self, batch: int, role: str = "cond") -> slice:
        """The samples of one branch."""
        first = (role == "cond") == self.cond_first
        return slice(0, batch // 2) if first else slice(batch // 2, batch)

    def _is_pair(self, which: tuple, model: nn.Module, first: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the batch is one of guidance; looked at once for each run and shape."""
        if which not in self._pairs:
            half = len(first) // 2
            self._pairs[which] = (
                len(first) == 2 * half > 0
                and _equal(first[:half], first[half:])
                and cut_batch(model, args, kwargs, len(first), self.rows(len(first))) is not None
            )
        return self._pairs[which]

    def _learn(self, which: tuple, output: Any, first: Any, named: dict[str, Any]) -> None:
        tensors, form = pytree.tree_flatten(output)
        batch, listed = len(first), not isinstance(first, Tensor)
        cond, uncond = self.rows(batch), self.rows(batch, "uncond")
        fits = all(t is None or isinstance(t, Tensor) for t in tensors)
        if fits and listed and len(tensors) == batch:
            fits = self._remember(tensors[cond], tensors[uncond], named)
        elif fits and not listed and all(t is None or t.shape[:1] == (batch,) for t in tensors):
            fits = self._remember(
                [None if t is None else t[cond] for t in tensors], [None if t is None else t[uncond] for t in tensors],
                named,
            )  # fmt: skip
        else:
            fits = False
        self._split, self._pair = _Split(form, listed), which
        if not fits:
            self._pairs[which] = False
            for feature in self.features:
                feature.clear()

    # --------------------------------------------------------------------------------------------------- the bands
    def _fits(self, tensors: Sequence[Tensor | None]) -> bool:
        bands = self._bands
        return bands is not None and [None if t is None else t.shape for t in tensors] == [
            None if b is None else b.shape[1:] for b in bands
        ]

    def _remember(self, cond: Sequence[Tensor | None], uncond: Sequence[Tensor | None], named: dict[str, Any]) -> bool:
        """Keep the bands of `uncond - cond`; False where the outputs have no known image grid."""
        bands: list[Tensor | None] = []
        self._bands = None
        for c, u in zip(cond, uncond, strict=True):
            if c is None or u is None or c.shape != u.shape:
                bands.append(None)
                if c is not u:
                    return False
                continue
            shape = _image_shape(c, self.grid, named)
            if shape is None:
                self.generation.note(
                    f"outputs {tuple(c.shape)} are no images and their grid is not known, so the unconditional branch "
                    "is always computed; pass grid=(rows, columns)"
                )
                return False
            bands.append(split_bands(u, c, shape))
        self._bands, self._factors, self._grown = bands, (1.0, 1.0), self.generation.index
        return True

    def _forecast(self, cond: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The unconditional outputs of this step."""
        assert self._bands is not None
        if self._grown != self.generation.index:
            self._grown = self.generation.index
            low, high = self.growth(self.generation)
            self._factors = (self._factors[0] * low, self._factors[1] * high)
        low, high = self._factors
        return [
            None if c is None or b is None else (c + (low * b[0] + high * b[1])).to(c.dtype)
            for c, b in zip(cond, self._bands, strict=True)
        ]


def split_bands(uncond: Tensor, cond: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The low and the high band of `uncond - cond`.

    Low are the frequencies within `min(H, W) // 5` of zero; the disc is symmetric, so both bands are real.

    Args:
        uncond: Output of the unconditional branch, float, any shape.
        cond: Of the conditional one, the same shape.
        shape: The shape `(..., H, W, channels)` in which tokens become images, or `()` if H and W are the last dims.

    Returns:
        `(2, *cond.shape)`, fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(cond.dtype, torch.float32)
    delta = uncond.to(wide) - cond.to(wide)
    image, dims = (delta.reshape(shape), (-3, -2)) if shape else (delta, (-2, -1))
    disc = _disc(image.shape[dims[0]], image.shape[dims[1]], image.device)
    spectrum = torch.fft.fftshift(torch.fft.fft2(image, dim=dims), dim=dims)
    spectrum = spectrum * (disc[..., None] if shape else disc)
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=dims), dim=dims).real.reshape(delta.shape)
    return torch.stack([low, delta - low])


@functools.lru_cache(maxsize=32)
def _disc(height: int, width: int, device: torch.device) -> Tensor:
    """Frequencies near zero in a spectrum whose zero is in the middle."""
    y = torch.arange(height, device=device)[:, None] - height // 2
    x = torch.arange(width, device=device)[None, :] - width // 2
    return x**2 + y**2 <= (min(height, width) // 5) ** 2


def _image_shape(output: Tensor, grid: tuple[int, int] | None, named: dict[str, Any]) -> tuple[int, ...] | None:
    """How tokens `(B, N, C)` become images, `()` for what is one already, None if that is not known."""
    if output.dim() >= 4:
        return ()
    if output.dim() != 3:
        return None
    batch, tokens, channels = output.shape
    if grid is not None:
        if tokens % (grid[0] * grid[1]):
            raise ValueError(f"grid={grid} does not fit outputs of {tokens} tokens")
    else:
        found = _grid_of(named)
        if found is None or tokens % (found[0] * found[1]):
            return None
        grid = found
    return batch, -1, *grid, channels


def _grid_of(named: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of tokens, where the model is told."""
    size = named.get("height"), named.get("width")  # LTX
    if all(isinstance(n, int) and n > 0 for n in size):
        return size  # type: ignore[return-value]
    shapes = named.get("img_shapes")  # Qwen-Image: (frames, rows, columns) of each image of each sample
    while isinstance(shapes, list) and shapes:
        shapes = shapes[0]
    if isinstance(shapes, tuple) and len(shapes) == 3:
        return int(shapes[1]), int(shapes[2])
    return None


def _samples(value: Any) -> bool:
    """Whether it is a list of samples."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, Tensor) for t in value)


def _key(first: Any) -> tuple:
    return key_of(*([first] if isinstance(first, Tensor) else first))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------ modules inside
class GuidedSite(Site):
    """The memory of a module of a guided model: of the conditional branch alone where a batch holds both.

    At a step that computes both branches it is computed.
    """

    def __init__(
        self,
        guidance: Guidance,
        rule: StepRule,
        forecaster: Forecaster | None = None,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(guidance.generation, rule, forecaster, storage)
        self.guidance = guidance
        guidance.features.append(self.feature)

    def recall(self, x: Tensor, own: bool = False, late: bool = False) -> Any | None:
        """The output if this step takes it from memory, else None."""
        return None if self.guidance.whole else super().recall(x, own, late)

    def key(self, x: Tensor) -> tuple:
        """What has to stay the same; a lone sample is no conditional half."""
        if not self.guidance.paired:
            return super().key(x)
        return *key_of(x[self._rows(x)] if self.guidance.whole else x), "conditional half"

    def store(self, x: Tensor, output: Any) -> None:
        """Remember the output of a computed call."""
        guidance = self.guidance
        if guidance.paired and guidance.whole:
            tensors, form = pytree.tree_flatten(output)
            if not all(t is None or (isinstance(t, Tensor) and t.shape[:1].numel() % 2 == 0) for t in tensors):
                self.computed += 1
                return
            output = pytree.tree_unflatten([None if t is None else t[self._rows(t)] for t in tensors], form)
        super().store(x, output)

    def _rows(self, value: Tensor) -> slice:
        # Frames or pixels may be folded into the batch: the branch is still the outermost part of it.
        return self.guidance.rows(value.shape[0])


def guide(model: nn.Module, guidance: Guidance, transaction: Transaction, claimant: str) -> None:
    """Plan that the model's calls go through `guidance`."""
    transaction.set(model, GUIDANCE, guidance, claimant)
    transaction.wrap_forward(model, _guided_forward)


def _guided_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[GUIDANCE].call(self, inner, args, kwargs)
