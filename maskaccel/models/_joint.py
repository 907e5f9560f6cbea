"""In which order blocks of two streams join them for attention."""

from __future__ import annotations

from torch import nn

_TEXT_FIRST = frozenset({
    "AuraFlowJointTransformerBlock", "BriaTransformerBlock", "BriaFiboTransformerBlock", "ChromaTransformerBlock",
    "EasyAnimateTransformerBlock", "FluxTransformerBlock", "Flux2TransformerBlock", "LongCatImageTransformerBlock",
    "OvisImageTransformerBlock", "QwenImageTransformerBlock",
})  # fmt: skip
_TEXT_LAST = frozenset({
    "HunyuanImageTransformerBlock", "HunyuanVideoTransformerBlock", "HunyuanVideo15TransformerBlock",
    "JointTransformerBlock", "JoyImageEditPlusTransformerBlock", "JoyImageTransformerBlock", "MochiTransformerBlock",
    "MotifVideoTransformerBlock", "NucleusMoEImageTransformerBlock",
})  # fmt: skip


def text_first(block: nn.Module) -> bool | None:
    """Whether attention of this block sees text tokens before image tokens; None where that is not known."""
    name = type(block).__name__
    return True if name in _TEXT_FIRST else False if name in _TEXT_LAST else None
