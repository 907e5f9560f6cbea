"""The modulated input of a block's attention, and the time embedding that a block is given: what TeaCache watches.

Each function calls the norm and modulation submodules of a block and nothing else of it. A block is known by its class,
or by a norm that modulates by itself, so copies of a class that other models carry are known too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._attention import hooked
from ._parts import modulated_norm, modulated_norm_against
from ._streams import parameters_of

Tap = Callable[[nn.Module, Sequence[Any], dict[str, Any]], Tensor]
Operands = tuple[nn.Module, Tensor, Tensor | None, Tensor | None]  # norm, its input, scale, shift


@dataclass(frozen=True)
class NormTap:
    """A tap that is one norm and its modulation, so that one pass also tells how far it moved.

    Attributes:
        operands: Norm, input, scale and shift of a block's call; None where the call is not of this form.
        otherwise: The tap of such calls.
    """

    operands: Callable[[Any, Sequence[Any], dict[str, Any]], Operands | None]
    otherwise: Tap | None = None

    def __call__(self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        found = self.operands(block, args, kwargs)
        return modulated_norm(*found) if found is not None else self._other(block, args, kwargs)

    def against(
        self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], reference: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The tap, and its `relative_difference` from `reference` where the same pass gives it; the tap is then new."""
        found = self.operands(block, args, kwargs)
        if found is None:
            return self._other(block, args, kwargs), None
        return modulated_norm_against(*found, reference)

    def _other(self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        assert self.otherwise is not None
        return self.otherwise(block, args, kwargs)


# Norms `norm1(x, emb)` that return the modulated input first.
_ADAPTIVE = {
    "AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX", "ChromaAdaLayerNormZeroPruned",
    "ChromaAdaLayerNormZeroSinglePruned", "MochiRMSNormZero", "LuminaRMSNormZero",
}  # fmt: skip
_NORMS = ("norm1", "norm")  # in a block of two streams, and of a joint one
_TIMES = ("temb", "emb", "adaln_input", "timestep", "temb_mod_img", "temb_mod", "vec", "c", "t")


def _argument(block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], *names: str) -> Any:
    """The first of some arguments of a block's call that is there."""
    order = parameters_of(type(block))
    for name in names:
        position = order.index(name) if name in order else len(args)
        value = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        if value is not None:
            return value
    raise LookupError(f"{type(block).__name__} was called without {' or '.join(names)}")


def _hidden(block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return _argument(block, args, kwargs, parameters_of(type(block))[0])


def _adaptive(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """A norm that takes the embedding and returns the modulated input and the gates."""
    norm = next(getattr(block, name) for name in _NORMS if hasattr(block, name))
    emb = _argument(block, args, kwargs, "temb", "emb")
    if type(norm).__name__.startswith("Chroma"):
        # The model gives the modulation of both streams; the first half of it is the image's.
        emb = emb[:, :6] if type(norm).__name__ == "ChromaAdaLayerNormZeroPruned" else emb
    named = "emb" in parameters_of(type(norm))
    x = _hidden(block, args, kwargs)
    return (norm(x, emb=emb) if named else norm(x, emb))[0]


def _adaptive_operands(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands | None:
    """AdaLayerNormZero and AdaLayerNormZeroSingle, unless something runs when the whole norm is called."""
    norm = next(getattr(block, name) for name in _NORMS if hasattr(block, name))
    if hooked(norm) or getattr(norm, "emb", None) is not None:
        return None
    emb = norm.linear(norm.silu(_argument(block, args, kwargs, "temb", "emb")))
    shift, scale = emb.chunk(6 if type(norm).__name__ == "AdaLayerNormZero" else 3, dim=1)[:2]
    return norm.norm, _hidden(block, args, kwargs), scale, shift


def _basic_zero(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """BasicTransformerBlock of DiT: its norm embeds the timestep and the label."""
    x, timestep = _hidden(block, args, kwargs), _argument(block, args, kwargs, "timestep")
    return block.norm1(x, timestep, _argument(block, args, kwargs, "class_labels"), hidden_dtype=x.dtype)[0]


def _basic_zero_operands(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands | None:
    norm = block.norm1
    if hooked(norm):
        return None
    x, timestep = _hidden(block, args, kwargs), _argument(block, args, kwargs, "timestep")
    emb = norm.emb(timestep, _argument(block, args, kwargs, "class_labels"), hidden_dtype=x.dtype)
    shift, scale = norm.linear(norm.silu(emb)).chunk(6, dim=1)[:2]
    return norm.norm, x, scale, shift


def _basic_single(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    """BasicTransformerBlock of PixArt."""
    x, timestep = _hidden(block, args, kwargs), _argument(block, args, kwargs, "timestep")
    shift, scale = (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1))[:, :2].unbind(1)
    return block.norm1, x, scale, shift


def _wan(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """WanTransformerBlock: one embedding a sample `(B, 6, D)`, or one a token `(B, N, 6, D)`."""
    x, temb = _hidden(block, args, kwargs), _argument(block, args, kwargs, "temb").float()
    table = block.scale_shift_table if temb.dim() == 3 else block.scale_shift_table.unsqueeze(0)
    shift, scale = (table + temb).narrow(-2, 0, 2).unbind(-2)
    if temb.dim() == 3:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)


def _ltx(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    """LTXVideoTransformerBlock."""
    x, temb = _hidden(block, args, kwargs), _argument(block, args, kwargs, "temb")
    table = block.scale_shift_table
    mods = table[None, None] + temb.reshape(x.shape[0], temb.shape[1], table.shape[0], -1)
    return block.norm1, x, mods[:, :, 1], mods[:, :, 0]


def _qwen(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """QwenImageTransformerBlock, image stream; its own method does the edit models' two modulations."""
    x = _hidden(block, args, kwargs)
    order = parameters_of(type(block))
    at = order.index("modulate_index") if "modulate_index" in order else len(args)
    index = kwargs.get("modulate_index", args[at] if at < len(args) else None)
    mods = block.img_mod(_argument(block, args, kwargs, "temb")).chunk(2, dim=-1)[0]
    return block._modulate(block.img_norm1(x), mods, index)[0]


def _flux2(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    """Flux2TransformerBlock, image stream; the model prepares the modulation."""
    x, mods = _hidden(block, args, kwargs), _argument(block, args, kwargs, "temb_mod_img")
    shift, scale = (mods.unsqueeze(1) if mods.dim() == 2 else mods).chunk(6, dim=-1)[:2]
    return block.norm1, x, scale, shift


def _zimage(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    """ZImageTransformerBlock; of an edit model's two modulations, that of the noisy tokens."""
    x, emb = _hidden(block, args, kwargs), _argument(block, args, kwargs, "adaln_input", "adaln_noisy")
    return block.attention_norm1, x, block.adaLN_modulation(emb).chunk(4, dim=1)[0], None


def _original(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Operands:
    """The block of the original DiT and SiT code."""
    x, c = _hidden(block, args, kwargs), _argument(block, args, kwargs, "c")
    shift, scale = block.adaLN_modulation(c).chunk(6, dim=-1)[:2]
    return block.norm1, x, scale, shift


_BY_CLASS: dict[str, Tap] = {
    "WanTransformerBlock": _wan,
    "LTXVideoTransformerBlock": NormTap(_ltx),
    "QwenImageTransformerBlock": _qwen,
    "Flux2TransformerBlock": NormTap(_flux2),
    "ZImageTransformerBlock": NormTap(_zimage),
}


def modulated_tap(block: nn.Module) -> Tap:
    """How to compute the modulated input of the attention of `block` from the arguments of its call.

    Raises:
        LookupError: The block is of no kind that is known.
    """
    name = type(block).__name__
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    if name == "BasicTransformerBlock" and getattr(block, "norm_type", "") == "ada_norm_zero":
        return NormTap(_basic_zero_operands, _basic_zero)
    if name == "BasicTransformerBlock" and getattr(block, "norm_type", "") == "ada_norm_single":
        return NormTap(_basic_single)
    norm = next((getattr(block, one) for one in _NORMS if hasattr(block, one)), None)
    if type(norm).__name__ in _ADAPTIVE and {"temb", "emb"} & set(parameters_of(type(block))):
        exact = type(norm).__name__ in ("AdaLayerNormZero", "AdaLayerNormZeroSingle")
        return NormTap(_adaptive_operands, _adaptive) if exact else _adaptive
    modulation = getattr(block, "adaLN_modulation", None)
    if isinstance(modulation, nn.Sequential) and hasattr(block, "norm1") and parameters_of(type(block))[1:2] == ["c"]:
        width = getattr(modulation[-1], "out_features", 0)
        if width and width == 6 * modulation[-1].in_features:
            return NormTap(_original)
    raise LookupError(f"the modulated input of a {name} is not known")


def time_tap(block: nn.Module) -> Tap:
    """How to read the time embedding from the arguments of a block's call.

    Raises:
        LookupError: The block is given none.
    """
    if type(block).__name__ == "BasicTransformerBlock" and getattr(block, "norm_type", "") == "ada_norm_zero":
        return _basic_time  # it is given the bare timestep, and embeds it
    names = [name for name in _TIMES if name in parameters_of(type(block))]
    if not names:
        raise LookupError(f"a {type(block).__name__} is given no time embedding")
    return lambda block, args, kwargs: _argument(block, args, kwargs, *names)


def _basic_time(block: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    combined = block.norm1.emb
    timestep, x = _argument(block, args, kwargs, "timestep"), _hidden(block, args, kwargs)
    return combined.timestep_embedder(combined.time_proj(timestep).to(x.dtype))
