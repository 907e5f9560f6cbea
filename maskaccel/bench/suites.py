"""Named sets of cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .registry import OPS, Op, Shape

# Two batches of PixArt at 1024 px, one of FLUX: wide and long enough to leave every CPU cache.
CPU_TOKENS: tuple[Shape, ...] = ((2, 4096, 1152), (1, 4608, 3072))
CPU_SHAPES: dict[str, tuple[Shape, ...]] = {
    "norm_modulate": CPU_TOKENS,
    "gate_residual_norm_modulate": CPU_TOKENS,
    "gate_residual": CPU_TOKENS,
    "qk_norm_rope": ((1, 4608, 24, 128),),
    "gated_activation.swiglu": ((1, 4128, 20480),),
    "gated_activation.geglu": ((1, 4128, 20480),),
    "relative_difference": CPU_TOKENS,
    "combine_history": tuple((3, *shape) for shape in CPU_TOKENS),
    "combine_sites": ((14, 2, 2, 1024, 1152),),
    "gram": tuple((3, *shape) for shape in CPU_TOKENS),
    "scatter_combine": tuple((2, *shape) for shape in CPU_TOKENS),
    "scatter_combine.clusters": tuple((2, *shape) for shape in CPU_TOKENS),
    "kmeans": ((2, 1024, 1152), CPU_TOKENS[1]),
    "combine_history_norm_modulate": tuple((3, *shape) for shape in CPU_TOKENS),
    "norm_modulate_difference": CPU_TOKENS,
    "tile_attention": ((1, 2048, 8, 64), (1, 2048, 4, 128)),
    "tile_attention.quarter": ((1, 2048, 8, 64), (1, 2048, 4, 128)),
    "merge_attention": ((1, 4608, 24, 128),),
    "linear_attention": ((1, 4608, 24, 128),),
    "attention_column_sums": ((1, 2048, 8, 64),),
    "gather_rows": CPU_TOKENS,
    "gather_modulate": CPU_TOKENS,
    "scatter_merge": CPU_TOKENS,
    "sparse_dense_fuse": ((8, 1024, 384),),
    "merge_tokens": CPU_TOKENS,
    "unmerge_tokens": CPU_TOKENS,
    "select_active": CPU_TOKENS,
    "write_kv_rows": ((1, 4608, 24, 128),),
    "read_kv_rows": ((1, 4608, 24, 128),),
    "confidence_unmask": ((1, 64, 32768), (2, 256, 8256)),
}


@dataclass(frozen=True)
class Entry:
    """One case of a suite."""

    op: Op
    shape: Shape
    dtype: str
    backward: bool
    model: str | None


def _model(op: Op, shape: Shape) -> str | None:
    return next((name for name, known in op.shapes.items() if known == shape), None)


def _both_ways(op: Op) -> tuple[bool, ...]:
    return (False, True) if op.wants_grad else (False,)


def cpu() -> Iterator[Entry]:
    """The acceptance shapes on a CPU, fp32 and bf16, both directions."""
    for name, shapes in CPU_SHAPES.items():
        op = OPS[name]
        for shape in shapes:
            for dtype in ("fp32", "bf16"):
                for backward in _both_ways(op):
                    yield Entry(op, shape, dtype, backward, _model(op, shape))


def models() -> Iterator[Entry]:
    """Every shape of every real model in bf16: for a GPU (the video shapes take gigabytes)."""
    for op in OPS.values():
        for model, shape in op.shapes.items():
            for backward in _both_ways(op):
                yield Entry(op, shape, "bf16", backward, model)


SUITES = {"cpu": cpu, "models": models}
