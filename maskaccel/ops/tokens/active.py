"""Which tokens are computed at a step, by score and age."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _checks
from . import _run
from .schema import THRESHOLD

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex

OLDEST = 256  # steps after which a token's weight no longer grows


def select_active(
    score: Tensor,
    age: Tensor | None,
    keep: Any,
    *,
    beta: float = 0.1,
    high_fraction: float = 0.0,
    force: Tensor | None = None,
    threshold: float | None = None,
    backend: str | None = None,
) -> tuple[TokenIndex, Tensor]:
    """The tokens of the largest `score * exp(beta * age)`, and the ages after this step.

    The selection of RAS (Liu et al. 2025, arXiv 2502.10389): a token's importance grows with the steps since it was
    computed, so that none starves. Of the dropped tokens a share `high_fraction` may be those of the highest metric.

    Args:
        score: `(B, N)`, any floating dtype; `(1, N)` selects for all samples. NaN counts as the lowest.
        age: Integers `(B, N)`, steps since a token was computed, or None for zeros. The weight grows up to age 256.
        keep: How many: a count, or a fraction of N (rounded up).
        beta: Growth of the weight for each step of age, 0 or more.
        high_fraction: Share of the dropped tokens, 0 to 1, that are taken from the top of the order, rounded.
        force: Bool `(N,)` or `(B, N)`: tokens that are kept first. Of more than `keep` the first are kept.
        threshold: Keep the tokens whose metric is this or more (and the forced ones), at most `keep`: the index is
            ragged then. None keeps exactly `keep`.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(index, age)`: TokenIndex, and int32 `(B, N)`: 0 for kept tokens, one more for the others.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes do not fit, numbers out of range, or `score` requires grad.
    """
    if backend is None and force is threshold is None and high_fraction == 0.0 and not _call.tracing():
        try:
            return _by_rank(score, age, keep, beta)
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    from ...masks.tokens import TokenIndex

    score = _checks.floating("score", score)
    if score.dim() != 2 or score.shape[1] == 0:
        raise ValueError(f"score has shape {tuple(score.shape)}; it must be (B, N) with tokens")
    _checks.no_gradient("select_active", score=score)
    batch, n = score.shape
    count = _run.kept_count("keep", keep, n)
    beta = _run.number("beta", beta, 0.0, 100.0)
    high = round(_run.number("high_fraction", high_fraction, 0.0, 1.0) * (n - count))
    flags = 0
    if threshold is not None:
        if high_fraction:
            raise ValueError(f"high_fraction={high_fraction} cannot be had with a threshold")
        if not isinstance(threshold, int | float) or math.isnan(threshold):
            raise ValueError(f"threshold={threshold!r} must be a number")
        flags = THRESHOLD
    ages = (
        torch.zeros(batch, n, dtype=torch.int32, device=score.device)
        if age is None
        else _run.rows_of("age", age, batch, n, score.device).expand(batch, n).contiguous()
    )
    forced = _run.flags_of("force", force, batch, n, score.device)
    args = (score.float().contiguous(), ages, _weights(beta, score.device), forced, count, high,
            float(threshold or 0.0), flags)  # fmt: skip
    ids, inverse, counts, new_age = _run.run("select_active", args, score.device, backend)
    return TokenIndex(ids, inverse, counts if flags else None), new_age


def _by_rank(score: Tensor, age: Tensor | None, keep: Any, beta: float) -> tuple[TokenIndex, Tensor]:
    """The everyday call, checked by the kernel."""
    if score.dim() != 2 or (score.requires_grad and torch.is_grad_enabled()):
        raise LookupError
    if type(beta) not in (float, int) or not 0.0 <= beta <= 100.0:
        raise LookupError
    batch, n = score.shape
    if type(keep) is not int or not 1 <= keep <= n:
        keep = _run.kept_count("keep", keep, n)
    ages = _run.constant(0, (batch, n), torch.int32, score.device) if age is None else age
    args = (score, ages, _weights(beta, score.device), None, keep, 0, 0.0, 0)
    ids, inverse, _, new_age = _call.undifferentiated("select_active", score, args)
    return _run.token_index().of_kernel(ids, inverse), new_age


@functools.lru_cache(maxsize=64)
def _weights(beta: float, device: torch.device) -> Tensor:
    """`exp(beta * age)` by age, made on the host so that every device has the same; finite."""
    weights = torch.exp(beta * torch.arange(OLDEST + 1, dtype=torch.float64)).clamp(max=1e30)
    return weights.float().to(device)
