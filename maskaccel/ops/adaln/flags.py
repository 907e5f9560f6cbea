"""Options as the kernels take them: flag bits by the names of the API, and all numbers of a bare op in one."""

from __future__ import annotations

import functools
import struct

from .schema import (
    ACROSS_HEADS,
    ACTIVATIONS,
    CLIP,
    GATE_ACTS,
    GATE_FIRST,
    LAWS,
    NO_RESIDUAL,
    NORMS,
    OFFSET_ONE,
    POST_NORMS,
    ROPE_HALF,
    WEIGHT_PLUS_ONE,
)  # fmt: skip

NORM_FLAGS = {
    (norm, law, offset): NORMS[norm] | LAWS[law] | (WEIGHT_PLUS_ONE if offset else 0)
    for norm in NORMS
    for law in LAWS
    for offset in (0.0, 1.0)
}
GATE_FLAGS = {(act, post): GATE_ACTS[act] | POST_NORMS[post] for act in GATE_ACTS for post in POST_NORMS}
ROPE_FLAGS = {
    (across, rope): (ACROSS_HEADS if across else 0) | (ROPE_HALF if rope == "half" else 0)
    for across in (False, True)
    for rope in ("interleaved", "half")
}
ACTIVATION_FLAGS = {
    (kind, first): ACTIVATIONS[kind] | (GATE_FIRST if first else 0) for kind in ACTIVATIONS for first in (False, True)
}
_FP32_MOST = 3.4028234e38


def packed(flags: int, eps: float, offset: float) -> int | None:
    """The numbers of a bare op (`schema.BARE`); None if they do not fit, or are none that an op takes.

    `eps` serves for `post_eps` too.
    """
    if not 0.0 <= eps <= _FP32_MOST or offset not in (0.0, 1.0):
        return None
    (bits,) = struct.unpack("<I", struct.pack("<f", eps))
    return flags | (OFFSET_ONE if offset else 0) | bits << 32


def unpacked(numbers: int) -> dict[str, float]:
    """The numbers of the whole op from those of a bare one."""
    (eps,) = struct.unpack("<f", struct.pack("<I", numbers >> 32))
    return {"eps": eps, "post_eps": eps, "offset": float(bool(numbers & OFFSET_ONE)), "flags": numbers & 0xFFFF}


# These take an unknown name as KeyError and anything unhashable as TypeError, both faults of a fast call.
@functools.lru_cache(maxsize=1024)
def norm_numbers(norm: str, law: str, weight_offset: float, eps: float, offset: float) -> int | None:
    """`packed` for `norm_modulate_bare`."""
    return packed(NORM_FLAGS[norm, law, weight_offset], eps, offset)


@functools.lru_cache(maxsize=1024)
def gate_numbers(norm: str, law: str, weight_offset: float, gate_act: str, post_norm: str | None, clip: bool,
                 eps: float, offset: float, keep: bool = True) -> int | None:  # fmt: skip
    """`packed` for `gate_residual_norm_modulate_bare` and, with the norm `"none"`, `gate_residual_bare`."""
    flags = NORM_FLAGS[norm, law, weight_offset] | GATE_FLAGS[gate_act, post_norm]
    return packed(flags | (CLIP if clip else 0) | (0 if keep else NO_RESIDUAL), eps, offset)


@functools.lru_cache(maxsize=1024)
def qk_numbers(norm: str, law: str, weight_offset: float, across: bool, rope: str, eps: float) -> int | None:
    """`packed` for `qk_norm_rope_bare`."""
    return packed(NORM_FLAGS[norm, law, weight_offset] | ROPE_FLAGS[across, rope], eps, 0.0)
