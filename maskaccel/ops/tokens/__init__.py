"""Token ops: which rows run, and the way there and back."""

from .active import select_active
from .cache import read_kv_rows, write_kv_rows
from .draw import random_keep
from .fuse import sparse_dense_fuse
from .merging import MergeIndex, match_tokens, merge_tokens, unmerge_tokens
from .rows import gather_modulate, gather_rows, scatter_merge
from .unmask import confidence_unmask, sample_logits, unmask_select

__all__ = [
    "MergeIndex",
    "confidence_unmask",
    "gather_modulate",
    "gather_rows",
    "match_tokens",
    "merge_tokens",
    "random_keep",
    "read_kv_rows",
    "sample_logits",
    "scatter_merge",
    "select_active",
    "sparse_dense_fuse",
    "unmask_select",
    "unmerge_tokens",
    "write_kv_rows",
]
