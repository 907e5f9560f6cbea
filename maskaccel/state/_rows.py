"""Arguments of a block for some samples of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Unclear(Exception):
    """A tensor does not say which of its rows belong to which sample."""


def slice_batch(
    args: tuple, kwargs: dict[str, Any], streams: Sequence[Tensor | None], rows: Sequence[int]
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a block with every per-sample tensor cut to `rows`.

    A tensor whose first dim is the batch is per sample; one whose first dim is 1 or the number of tokens (of a stream,
    or of all together) is shared. Anything else, such as frames folded into the batch, is unclear.

    Returns:
        Arguments and keywords, or None if some tensor is unclear.
    """
    known = [s for s in streams if s is not None]
    batch, tokens = known[0].shape[0], {s.shape[1] for s in known if s.dim() > 2}
    tokens |= {sum(s.shape[1] for s in known if s.dim() > 2)}
    if batch in tokens:
        return None
    index = torch.tensor(rows, device=known[0].device)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] == 1:
                return value
            if value.shape[0] == batch:
                return value.index_select(0, index if value.device == index.device else index.to(value.device))
            if value.shape[0] in tokens:
                return value
            raise _Unclear
        if isinstance(value, tuple | list):
            return type(value)(cut(v) for v in value)
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return value

    try:
        return cut(args), cut(kwargs)
    except _Unclear:
        return None
