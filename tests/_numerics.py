"""The error rule of the project, as assertions.

Error against an fp64 truth must be at most twice that of plain torch in the same dtype, in maximum and in RMS, plus a
tiny absolute term (flash-attention's rule).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 2.0


def _slack(truth: Tensor, dtype: torch.dtype) -> float:
    """A few units in the last place of the largest value: what one different rounding may cost."""
    scale = truth.abs().max().item() if truth.numel() else 0.0
    return 2.0 * torch.finfo(dtype).eps * max(scale, torch.finfo(dtype).tiny)


def assert_close_to_truth(
    got: Tensor, plain: Tensor, truth: Tensor, *, what: str = "result", magnitude: float = 0.0
) -> None:
    """Assert the error rule for one tensor.

    Args:
        got: Result under test.
        plain: Plain torch in the same dtype.
        truth: The same in fp64.
        what: Name for the message.
        magnitude: Of the terms that the result is a sum of, where they may cancel.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"{what}: dtype {got.dtype}, expected {plain.dtype}"
    if not truth.numel():
        return
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(got) | ~finite, torch.ones_like(finite)), f"{what}: not finite where the truth is"
    error = (got.double() - truth)[finite].abs()
    plain_error = (plain.double() - truth)[finite].abs()
    slack = max(_slack(truth[finite], got.dtype), 0.5 * torch.finfo(got.dtype).eps * magnitude)
    for label, reduce in (("max", torch.amax), ("rms", lambda e: e.square().mean().sqrt())):
        mine, theirs = reduce(error).item(), reduce(plain_error).item()
        allowed = FACTOR * theirs + (slack if label == "max" else slack / 4)
        assert mine <= allowed, f"{what}: {label} error {mine:.3e}, plain torch {theirs:.3e}, allowed {allowed:.3e}"


def assert_all_close_to_truth(
    got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], what: str = ""
) -> None:
    """`assert_close_to_truth` for each tensor of three sequences."""
    assert len(got) == len(plain) == len(truth)
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert_close_to_truth(g, p, t, what=f"{what}[{i}]")
