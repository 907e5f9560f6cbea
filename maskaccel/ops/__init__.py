"""Stateless torch ops. Importing this package defines them; the native library is loaded if it is there."""

from . import _backends
from .adaln import autograd as _adaln_autograd
from .adaln import fallback as _adaln_fallback
from .adaln import gate_residual, gate_residual_norm_modulate, gated_activation, norm_modulate, qk_norm_rope
from .attention import (
    RelativePosition,
    attention_column_sums,
    linear_attention,
    merge_attention,
    segment_attention,
    tile_attention,
    tile_pool,
    tile_scores,
    tile_select,
)
from .attention import autograd as _attention_autograd
from .attention import reference as _attention_reference
from .attention import serves as _attention_serves
from .steps import api as _steps_api
from .steps import (
    combine_history,
    combine_history_norm_modulate,
    combine_sites,
    gram,
    kmeans,
    norm_modulate_difference,
    relative_difference,
    scatter_combine,
)
from .steps import reference as _steps_reference
from .tokens import (
    MergeIndex,
    confidence_unmask,
    gather_modulate,
    gather_rows,
    match_tokens,
    merge_tokens,
    random_keep,
    read_kv_rows,
    sample_logits,
    scatter_merge,
    select_active,
    sparse_dense_fuse,
    unmask_select,
    unmerge_tokens,
    write_kv_rows,
)
from .tokens import autograd as _tokens_autograd
from .tokens import reference as _tokens_reference

__all__ = [
    "MergeIndex",
    "RelativePosition",
    "attention_column_sums",
    "combine_history",
    "combine_history_norm_modulate",
    "combine_sites",
    "confidence_unmask",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gated_activation",
    "gather_modulate",
    "gather_rows",
    "gram",
    "kmeans",
    "linear_attention",
    "match_tokens",
    "merge_attention",
    "merge_tokens",
    "norm_modulate",
    "norm_modulate_difference",
    "qk_norm_rope",
    "random_keep",
    "read_kv_rows",
    "relative_difference",
    "sample_logits",
    "scatter_combine",
    "scatter_merge",
    "segment_attention",
    "select_active",
    "sparse_dense_fuse",
    "tile_attention",
    "tile_pool",
    "tile_scores",
    "tile_select",
    "unmask_select",
    "unmerge_tokens",
    "write_kv_rows",
]

_adaln_autograd.register()
_attention_autograd.register()
_attention_serves.register()
_steps_api.register()
_tokens_autograd.register()
_backends.native.load()  # after the schemas: its kernels attach to them
_backends.implement_fallbacks(
    {
        **_adaln_fallback.KERNELS,
        **_attention_reference.KERNELS,
        **_steps_reference.KERNELS,
        **_tokens_reference.KERNELS,
    }
)
