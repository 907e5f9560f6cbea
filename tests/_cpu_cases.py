"""Inputs and raw calls shared by the tests of the CPU kernels."""

from __future__ import annotations

import torch

import maskaccel.ops  # noqa: F401  (defines the ops and loads the library)
from maskaccel.ops.adaln import schema

RAW = torch.ops.maskaccel_raw
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, N, D = 2, 12, 72  # 72 is a head size and no multiple of a vector


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value


def three(function, *args, **kwargs):
    """Plain torch in the dtype of the arguments, and the fp64 truth under the law that rounds nowhere."""
    plain = function(*args, **kwargs)
    exact = {**{k: double(v) for k, v in kwargs.items()}, **({"law": "fp32"} if "law" in kwargs else {})}
    truth = function(*map(double, args), **exact)
    as_tuple = lambda v: v if isinstance(v, tuple) else (v,)  # noqa: E731
    return as_tuple(plain), as_tuple(truth)


def norm_flags(norm="layer", law="fp32", weight_offset=0.0, gate_act="none", post_norm=None, clip=False):
    return (
        schema.NORMS[norm]
        | schema.LAWS[law]
        | (schema.WEIGHT_PLUS_ONE if weight_offset else 0)
        | schema.GATE_ACTS[gate_act]
        | schema.POST_NORMS[post_norm]
        | (schema.CLIP if clip else 0)
    )


def raw_norm_modulate(
    x,
    scale=None,
    shift=None,
    *,
    norm="layer",
    weight=None,
    bias=None,
    eps=1e-6,
    offset=1.0,
    rows=None,
    law="fp32",
    weight_offset=0.0,
    scale_table=None,
    shift_table=None,
    scale2=None,
    shift2=None,
):
    flags = norm_flags(norm, law, weight_offset)
    end = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    if scale2 is None and shift2 is None:
        return (RAW.norm_modulate(x, scale, shift, *end),)
    return RAW.norm_modulate_pair(x, scale, shift, scale2, shift2, *end)


def raw_grnm(
    x,
    a,
    gate=None,
    scale=None,
    shift=None,
    *,
    gate_act="none",
    post_norm=None,
    post_weight=None,
    post_eps=1e-5,
    norm="layer",
    weight=None,
    bias=None,
    eps=1e-6,
    offset=1.0,
    rows=None,
    law="fp32",
    weight_offset=0.0,
    gate_table=None,
    scale_table=None,
    shift_table=None,
    scale2=None,
    shift2=None,
    clip=False,
):
    flags = norm_flags(norm, law, weight_offset, gate_act, post_norm, clip)
    end = (weight, bias, scale_table, shift_table, rows, eps, post_eps, offset, flags)
    if scale2 is None and shift2 is None:
        return RAW.gate_residual_norm_modulate(x, a, gate, gate_table, post_weight, scale, shift, *end)
    return RAW.gate_residual_norm_modulate_pair(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, *end)


def modulations(form, count, dtype, d=D):
    """`count` modulation tensors of a form, as strided chunks of one projection where the form allows."""
    shape = {
        "sample": (B, d),
        "row": (B, 1, d),
        "frame": (B, 3, d),
        "token": (B, N, d),
        "shared": (1, d),
        "shared_frame": (1, 4, d),
        "shared_token": (1, N, d),
        "rows": (5, d),
        "rows2": (5, d),
    }[form]
    wide = randn(*shape[:-1], shape[-1] * count, seed=3, scale=0.5).to(dtype)
    return wide.chunk(count, dim=-1)


def row_index(form):
    if not form.startswith("rows"):
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 5, (N,) if form == "rows" else (B, N), generator=generator, dtype=torch.int32)


FORMS = ("sample", "row", "frame", "token", "shared", "shared_frame", "shared_token", "rows", "rows2")


OPTIONS = [
    {"norm": "rms"},
    {"norm": "none", "offset": 0.0},
    {"norm": "layer", "offset": 0.0, "eps": 1e-2},
    {"norm": "rms", "weight": "w"},
    {"norm": "rms", "weight": "w", "weight_offset": 1.0},
    {"norm": "layer", "weight": "w", "bias": "b"},
    {"norm": "rms", "weight": "w32", "bias": "b32"},
    {"norm": "layer", "weight": "w32", "weight_offset": 1.0},
    {"scale_table": "t0", "shift_table": "t1"},
    {"norm": "rms", "scale_table": "t0", "shift_table": "t1", "weight": "w", "bias": "b"},
]
GATES = [
    {"gate_act": "tanh"},
    {"gate_act": "clamp_tanh", "gate_table": "t0"},
    {"gate_act": "sigmoid_1m"},
    {"post_norm": "rms"},
    {"post_norm": "rms", "post_weight": "w", "gate_act": "tanh"},
    {"post_norm": "layer", "post_weight": "w", "weight_offset": 1.0},
    {"clip": True},
]


def fill(options, dtype, d=D):
    vectors = {
        "w": randn(d, dtype=dtype, seed=7) + 1,
        "b": randn(d, dtype=dtype, seed=8),
        "w32": randn(d, seed=7) + 1,
        "b32": randn(d, seed=8),
        "t0": randn(d, dtype=dtype, seed=9) * 3,
        "t1": randn(d, dtype=dtype, seed=10),
    }
    return {k: vectors.get(v, v) if isinstance(v, str) else v for k, v in options.items()}


def tables(kind, s, heads, dh, dtype, batch=1):
    shape = {
        "pair": (s, dh // 2),
        "element": (s, dh),
        "batch": (batch, s, dh),
        "head": (batch, s, heads, dh // 2),
        "one_head": (batch, s, 1, dh),
        "complex": (s, dh // 2, 2),
    }[kind]
    angle = randn(*shape, seed=4, scale=3.0)
    if kind == "complex":
        both = torch.stack([angle[..., 0].cos(), angle[..., 0].sin()], -1).to(dtype)
        return both[..., 0], both[..., 1]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def qk_flags(norm, law, across, rope, weight_offset=0.0):
    return (
        schema.NORMS[norm]
        | schema.LAWS[law]
        | (schema.WEIGHT_PLUS_ONE if weight_offset else 0)
        | (schema.ACROSS_HEADS if across else 0)
        | (schema.ROPE_HALF if rope == "half" else 0)
    )
