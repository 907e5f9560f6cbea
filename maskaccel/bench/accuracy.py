"""The error rule: a kernel may be at most twice as far from the fp64 truth as plain torch is in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
# Plain torch can be exact by luck (one rounding, a power of two): this many units of the largest value are free.
FREE_UNITS = 2.0


@dataclass(frozen=True)
class Verdict:
    """Outcome of one comparison.

    Attributes:
        passed: Both the largest and the root-mean-square error are within the rule, and every value is finite where the
            truth is.
        error: Largest error of the kernel against the truth.
        plain_error: Largest error of plain torch in the same dtype.
        allowed: Largest error that passes.
        note: Why it failed; empty if it passed.
    """

    passed: bool
    error: float
    plain_error: float
    allowed: float
    note: str = ""


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = (value.double() - truth).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def judge(got: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Apply the rule to one tensor.

    Args:
        got: The kernel's result.
        plain: The result of plain torch in the same dtype.
        truth: The fp64 result.

    Returns:
        The verdict.
    """
    got, plain, truth = got.detach().cpu(), plain.detach().cpu(), truth.detach().cpu()
    if got.shape != truth.shape:
        return Verdict(False, math.inf, 0.0, 0.0, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if got.dtype != plain.dtype:
        return Verdict(False, math.inf, 0.0, 0.0, f"dtype {got.dtype}, expected {plain.dtype}")
    if truth.numel() == 0:
        return Verdict(True, 0.0, 0.0, 0.0)
    free = FREE_UNITS * torch.finfo(got.dtype).eps * truth.abs().max().item()
    error, rms = _errors(got, truth)
    plain_error, plain_rms = _errors(plain, truth)
    allowed, allowed_rms = FACTOR * plain_error + free, FACTOR * plain_rms + free / 4
    note = ""
    if not math.isfinite(error):
        note = "not finite where the truth is"
    elif error > allowed:
        note = f"error {error:.3g} above {allowed:.3g}"
    elif rms > allowed_rms:
        note = f"rms error {rms:.3g} above {allowed_rms:.3g}"
    return Verdict(not note, error, plain_error, allowed, note)


def judge_all(got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], names: Sequence[str]) -> Verdict:
    """Apply the rule to every tensor; the verdict of the worst one (largest error as a share of what is allowed)."""
    worst = Verdict(True, 0.0, 0.0, 0.0)
    worst_share = -1.0
    for g, p, t, name in zip(got, plain, truth, names, strict=True):
        verdict = judge(g, p, t)
        share = math.inf if not verdict.passed else verdict.error / verdict.allowed if verdict.allowed else 0.0
        if share > worst_share:
            note = f"{name}: {verdict.note}" if verdict.note else ""
            worst = Verdict(verdict.passed, verdict.error, verdict.plain_error, verdict.allowed, note)
            worst_share = share
        if not verdict.passed:
            break
    return worst
