"""What a block is given for each token, cut to the tokens that run.

A value is told by its sizes: a dim with as many entries as there are latent tokens, or latent and text tokens together.
Where sizes do not tell (a name that is of text, a batch as large as the grid), names do; what cannot be told is an
error, never a guess.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..masks import TokenIndex
from ..models._per_sample import NeedsSamples, PerSample, SampleTables
from ..models._tokens import tokens_of
from .layout import TokenLayout
from .transaction import is_compiled

_TEXT = re.compile(r"^(encoder|context|txt|text)")
_MASK = re.compile(r"mask")
_TABLE = re.compile(r"rot|rope|freq|pos|ids|indices|coords")
_CONTROL = re.compile(r"control")
_COUNTS = ("first_frame_num_tokens", "num_tokens")  # how many of the first tokens are of the first frame
_AND_ONE = ("modulation",)  # a row for each sample, and one more that is of all
_TWICE = ("temb",)  # a row for each sample, or two: the second ones of all samples after the first ones

# Between their blocks these models add to all latent tokens, count them, or keep a block's result for a later one.
_BETWEEN = {
    "HiDreamImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "WanAnimateTransformer3DModel",
    "WanVACETransformer3DModel",
}

# Blocks whose compiled code takes `SampleTables`: they have been compiled with them, as whole graphs.
_COMPILED = {
    "AceStepTransformerBlock", "AnyFlowTransformerBlock", "AudioDiTBlock", "BriaFiboSingleTransformerBlock",
    "BriaFiboTransformerBlock", "BriaSingleTransformerBlock", "BriaTransformerBlock", "ChromaSingleTransformerBlock",
    "ChromaTransformerBlock", "CogView4TransformerBlock", "CosmosTransformerBlock", "EasyAnimateTransformerBlock",
    "Flux2SingleTransformerBlock", "Flux2TransformerBlock", "Flux3SingleTransformerBlock", "FluxSingleTransformerBlock",
    "FluxTransformerBlock", "GlmImageTransformerBlock", "HunyuanDiTBlock", "HunyuanImageSingleTransformerBlock",
    "HunyuanImageTransformerBlock", "HunyuanVideo15TransformerBlock", "HunyuanVideoSingleTransformerBlock",
    "HunyuanVideoTransformerBlock", "Krea2TransformerBlock", "LongCatImageSingleTransformerBlock",
    "LongCatImageTransformerBlock", "LuminaNextDiTBlock", "MochiTransformerBlock", "MotifVideoSingleTransformerBlock",
    "MotifVideoTransformerBlock", "NucleusMoEImageTransformerBlock", "OmniGenBlock", "OvisImageSingleTransformerBlock",
    "OvisImageTransformerBlock", "QwenImageTransformerBlock", "SkyReelsV2TransformerBlock", "StableAudioDiTBlock",
    "WanTransformerBlock",
}  # fmt: skip

_REFUSED_MODELS = {
    "ErnieImageTransformer2DModel": "its tokens are the first dim of its streams, before the batch",
    "HeliosTransformer3DModel": "frames of its history are among its tokens, in numbers that its call does not say",
    "HunyuanVideoFramepackTransformer3DModel": "frames of its history are among its tokens",
    "LatteTransformer3DModel": "it puts frames into the batch between blocks, and rows of the batch into time",
    "TransformerTemporalModel": "its tokens are the frames of one place, and its batch the places",
}
_REFUSED_BLOCKS = {
    "Kandinsky6SRTransformerBlock": "its attention is over tiles of the grid",
    "MiniMaxMusic3DepthDecoderBlock": "its tokens are levels of one code, not places",
}


@dataclass(frozen=True)
class Rows:
    """The rows of the streams of one call.

    Attributes:
        tokens: Latent tokens where the span is entered, N.
        batch: Samples B.
        grid: Their grid, or None.
        text: Text tokens in joint sequences, or None.
        side: Where the text is in them.
    """

    tokens: int
    batch: int
    grid: tuple[int, ...] | None
    text: int | None
    side: str | None

    @classmethod
    def of(
        cls, method: str, layout: TokenLayout, hidden: Tensor, others: Mapping[str, Tensor],
        outer: tuple[TokenIndex, Rows] | None,
    ) -> Rows:  # fmt: skip
        """Of the streams that enter a span, `outer` being the span around it.

        Raises:
            ValueError: The rows are not what the model's call says of its tokens.
        """
        batch, count = hidden.shape[:2]
        joint, side = layout.tokens.joint, layout.tokens.text
        if outer is not None:
            index, rows = outer
            return cls(index.kept, batch, index.grid, rows.text, rows.side)
        grid = layout.grid
        tokens = 1
        for extent in grid or (count,):
            tokens *= extent
        beside = count - tokens
        if joint and grid is None and not any(_TEXT.search(name) for name in others):
            raise ValueError(f"{method}: the grid of the latent tokens is not known, and the stream may hold text too")
        text = layout.text if layout.text is None or layout.text >= 0 else None
        if joint and text is None:
            beside_it = [v.shape[1] for name, v in others.items() if v.dim() == 3 and _TEXT.search(name)]
            text = beside or (beside_it[0] if beside_it else None)
        if beside < 0 or (beside and (beside != text or side is None or (layout.text or 0) < 0)):
            known = "unknown" if grid is None else f"{grid}, {tokens} tokens"
            raise ValueError(
                f"{method}: the stream of latent tokens has {count} rows where the span begins; its grid is {known}, "
                f"the text {text or 0} tokens: it cannot be told which rows are latent tokens"
            )
        return cls(tokens, batch, grid, text, side if joint else None)

    def beside(self, method: str, x: Tensor, count: int) -> tuple[int, int]:
        """Rows of text before and after `count` latent tokens in a stream.

        Raises:
            ValueError: The stream has another number of rows than with the text or without it.
        """
        rest = x.shape[1] - count
        if rest and rest != self.text:
            also = f" or {count + self.text} with the text" if self.text else ""
            raise ValueError(
                f"{method}: a block is given {x.shape[1]} rows of the latent stream, not {count}{also}: between its "
                "blocks the model does something that a span of some tokens cannot follow"
            )
        return (rest, 0) if self.side == "first" else (0, rest)

    def latents(self, x: Tensor) -> Tensor:
        """The latent tokens of a stream where the span is entered."""
        start = x.shape[1] - self.tokens if self.side == "first" else 0
        return x[:, start : start + self.tokens] if x.shape[1] != self.tokens else x

    def joint(self, index: TokenIndex) -> TokenIndex:
        """The index of latent and text tokens."""
        text = self.text or 0
        return index.shift(text, 0) if self.side == "first" else index.shift(0, text)


class Follower:
    """Cuts values to the tokens of an index.

    Args:
        method: On whose behalf.
        rows: What the streams are.
        index: The tokens.
        held: What has been cut already in this call, for values without gradients; None keeps nothing.
        block: The block that is given them; None where samples run one by one.
    """

    def __init__(
        self, method: str, rows: Rows, index: TokenIndex, held: dict | None = None, block: nn.Module | None = None
    ) -> None:
        self.method, self.rows, self.index, self.held, self.block = method, rows, index, held, block
        self._joint: TokenIndex | None = None

    def cut(self, name: str, value: Any) -> Any:
        """A value with what it holds for each token cut to the index.

        Raises:
            NeedsSamples: It is for all samples, the index tells samples apart, and the block needs it without a batch.
            ValueError: It cannot be told which dim is that of the tokens.
        """
        if isinstance(value, tuple | list):
            parts = [self.cut(name, part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: self.cut(f"{name}.{key}", part) for key, part in value.items()}
        if isinstance(value, Tensor):
            return self._tensor(name, value)
        if isinstance(value, int) and not isinstance(value, bool) and name in _COUNTS:
            return self._count(value)
        if value is None or isinstance(value, bool | int | float | str | nn.Module) or callable(value):
            return value
        raise ValueError(
            f"{self.method}: {name} is a {type(value).__name__}; what it holds for each token is not known"
        )

    def _count(self, first: int) -> int:
        if self.index.batch > 1:
            raise NeedsSamples
        return int((self.index.keep < first).sum())

    def _tensor(self, name: str, value: Tensor) -> Tensor:
        dims = self.dims(name, value)
        if not dims:
            return value
        mask = _MASK.search(name) and value.dim() == 4  # (batch or 1, heads or 1, queries, keys)
        shared = self.index.batch > 1 and not mask and (0 in dims or value.shape[0] != self.rows.batch)
        kind = None
        if shared:
            kind = self._tables
            if kind is None:
                raise NeedsSamples(name)
        keep = self.held is not None and not value.requires_grad
        key = (id(value), *dims, self.index.batch, kind)
        if keep and key in self.held:  # type: ignore[operator]
            return self.held[key][1]  # type: ignore[index]
        result = value if kind is None else value[None]
        for dim in dims:
            result = _picked(self._of(value.shape[dim]), result, dim + (kind is not None))
        result = result if kind is None else kind(result)
        if keep:
            self.held[key] = (value, result)  # type: ignore[index]
        return result

    @functools.cached_property
    def _tables(self) -> type | None:
        return None if self.block is None else tables_for(self.block)

    def _of(self, size: int) -> TokenIndex:
        if size == self.rows.tokens:
            return self.index
        if self._joint is None:
            self._joint = self.rows.joint(self.index)
        return self._joint

    def dims(self, name: str, value: Tensor) -> list[int]:
        """The dims of the tokens in a value; none if it holds nothing for each."""
        rows, shape, leaf = self.rows, value.shape, name.rpartition(".")[2]
        mask, text = _MASK.search(leaf) is not None, _TEXT.search(leaf) is not None
        if text and not mask:
            return []
        sizes = {rows.tokens} | ({rows.tokens + rows.text} if rows.text else set())
        if text and not rows.text:  # a mask of cross-attention: of queries if of any of these
            return [value.dim() - 2] if value.dim() > 2 and shape[-2] == rows.tokens else []
        if text:
            sizes.discard(rows.tokens)
        measures = value.is_floating_point() or value.is_complex()
        found = [dim for dim in range(value.dim() - (measures and not mask)) if shape[dim] in sizes]
        table = _TABLE.search(name) is not None
        if shape[:1] == (rows.batch,) and 0 in found and (len(found) > 1 or not table):
            found.remove(0)
        trailing = list(range(value.dim() - len(found), value.dim()))
        if len(found) > 1 and not (mask and found == trailing):
            raise ValueError(
                f"{self.method}: {name} of shape {tuple(shape)} has {len(found)} dims as large as the {rows.tokens} "
                "latent tokens (or those with the text): it cannot be told which is theirs"
            )
        if found and rows.text == rows.tokens and shape[found[0]] == rows.tokens and (table or mask):
            raise ValueError(
                f"{self.method}: {name} of shape {tuple(shape)}: there are {rows.tokens} text tokens and as many "
                "latent ones, so it cannot be told whose it is"
            )
        return found


def _picked(index: TokenIndex, value: Tensor, dim: int) -> Tensor:
    """Rows of a value along a dim; where the index tells samples apart, its first dim is the batch."""
    if index.batch == 1:
        return value.index_select(dim, index.keep[0])
    return index.gather(value, dim)


def sample_of(name: str, value: Any, sample: int, rows: Rows) -> Any:
    """The part of a value that is of one sample; what has no batch is whole."""
    if isinstance(value, tuple | list):
        parts = [sample_of(name, part, sample, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: sample_of(f"{name}.{key}", part, sample, rows) for key, part in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if name in _AND_ONE and value.shape[0] == rows.batch + 1:
        return value[[sample, -1]]
    if name in _TWICE and value.shape[0] == 2 * rows.batch:
        return value[sample :: rows.batch]
    if value.shape[0] != rows.batch:
        return value
    sizes = (rows.tokens, rows.tokens + (rows.text or 0))
    if _TABLE.search(name) and (value.dim() == 2 or rows.batch in sizes) and not set(value.shape[1:]) & set(sizes):
        return value  # a table of places that happen to be as many as samples
    return value[sample : sample + 1]


def tables_for(block: nn.Module) -> type | None:
    """What a block is given in place of one table for all samples; None: samples have to run one by one."""
    if not any(is_compiled(module) for module in block.modules()):
        return PerSample
    return SampleTables if type(block).__name__ in _COMPILED else None


def kept_between(model: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a call of a model does something to all latent tokens between its blocks."""
    control = any(_CONTROL.search(name) and value is not None for name, value in given.items())
    return control or type(model).__name__ in _BETWEEN


def span_refusal(model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str]) -> str | None:
    """Why blocks of a model cannot run on some of its tokens, or None."""
    tokens = tokens_of(model)
    if type(model).__name__ in _REFUSED_MODELS:
        return _REFUSED_MODELS[type(model).__name__]
    if tokens.joint and tokens.text is None:
        return "where its text is among the latent tokens differs from call to call"
    for block, name in zip(blocks, names, strict=True):
        kind = type(block).__name__
        if kind in _REFUSED_BLOCKS:
            return f"{kind}: {_REFUSED_BLOCKS[kind]}"
        if tokens.apart is not None and re.search(tokens.apart, f"{name}."):
            return f"{name} attends to all latent tokens of other blocks"
        for path, module in block.named_modules():
            size = getattr(module, "kernel_size", 1) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
            if any(k > 1 for k in (size if isinstance(size, tuple) else (size,))):
                return f"{path} of {kind} convolves over the grid of all of them"
    return None
