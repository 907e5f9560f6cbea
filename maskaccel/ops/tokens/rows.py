"""Kept rows and their way back: gather, gather with norm and modulation, merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _checks
from ..adaln import check as adaln_check
from ..adaln.flags import NORM_FLAGS, norm_numbers
from . import _run
from .schema import MERGES, NO_ROWS

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex

_INF = float("inf")
# What a mode of `scatter_merge` takes; gate and pos may be None.
_OPERANDS = {
    "replace": ("full",),
    "add_gated": ("full", "gate"),
    "mask_token": ("mask_token", "pos"),
    "blend": ("full", "lam"),
    "zero": ("pos",),
}


def gather_rows(x: Tensor, index: TokenIndex, *, backend: str | None = None) -> Tensor:
    """The kept rows of `x`; differentiable, its gradient written in one pass through the inverse map.

    Args:
        x: `(B, N, D)`, fp32, bf16 or fp16 (fp64 on the reference), any strides with a dense last dim.
        index: Which rows, of N tokens; for B samples or for all alike. `index.gather` serves other shapes and dtypes.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, K, D)`; zeros in the slots of a ragged index that hold no token.

    Raises:
        TypeError: `x` is no floating tensor, or `index` no TokenIndex.
        ValueError: Shapes do not fit, or `backend` cannot run the call.
    """
    if backend is None and not _call.tracing():
        try:
            if x.shape[1] == index.inverse.shape[1]:
                return _call.fast("gather_rows", x, (x, index.keep, index.inverse))
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    x = _checks.activation("x", x)
    index = _run.index_fits(index, x.shape[0], x.shape[1], x)
    args = (_checks.dense_last(x), index.keep, index.inverse)
    return _run.run("gather_rows", args, x.device, backend, x.dtype)


def gather_modulate(
    x: Tensor,
    index: TokenIndex,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    law: str = "fp32",
    weight_offset: float = 0.0,
    return_rows: bool = True,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The kept rows, and `norm(rows) * (offset + scale) + shift` of them, in one read of what is kept.

    Args:
        x: `(B, N, D)`, as in `gather_rows`.
        index: Which rows.
        scale: `(B, D)`, `(B, 1, D)`, or `(B, N, D)` for each token, of which the kept rows are read; batch 1 is for
            all samples.
        shift: As `scale`.
        norm: The norm and what follows are those of `maskaccel.ops.norm_modulate`.
        weight: As there.
        bias: As there.
        eps: As there.
        offset: As there.
        law: As there.
        weight_offset: As there.
        return_rows: Return the rows too (the residual stream); needed for gradients.
        backend: As there.

    Returns:
        `(rows, y)`, both `(B, K, D)`; rows is None without `return_rows`. Slots without a token are zeros.

    Raises:
        TypeError: As in `gather_rows`.
        ValueError: As in `gather_rows`; or a gradient is wanted without `return_rows`.
    """
    if backend is None and not _call.tracing():
        try:
            numbers = norm_numbers(norm, law, weight_offset, eps, offset)
            found = None
            if numbers is not None and weight is None and bias is None:
                numbers |= 0 if return_rows else NO_ROWS
                found = _call.bare("gather_modulate_bare", x, (x, index.keep, index.inverse, scale, shift, numbers))
            if found is None:
                found = _whole_modulate(x, index, scale, shift, norm, weight, bias, eps, offset, law, weight_offset,
                                        return_rows)  # fmt: skip
            rows, y = found
            return (rows if return_rows else None), y
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    adaln_check.norm_arguments(x, norm, law, weight_offset, weight, bias, eps, offset)
    batch, n, _ = x.shape
    index = _run.index_fits(index, batch, n, x)
    mods = {"scale": _token_rows("scale", scale, x), "shift": _token_rows("shift", shift, x)}
    scale, shift = _checks.one_dtype(x, *mods.values())
    weight, bias = _checks.one_dtype(x, weight, bias)
    flags = NORM_FLAGS[norm, law, float(weight_offset)] | (0 if return_rows else NO_ROWS)
    args: tuple = (_checks.dense_last(x), index.keep, index.inverse, scale, shift, weight, bias, float(eps),
                   float(offset), flags)  # fmt: skip
    if not return_rows and _call.wants_grad(args):
        raise ValueError("return_rows=False has no derivative; call it under torch.no_grad()")
    rows, y = _run.run("gather_modulate", args, x.device, backend, x.dtype)
    return (rows if return_rows else None), y


def _whole_modulate(
    x: Tensor, index: TokenIndex, scale: Tensor | None, shift: Tensor | None, norm: str, weight: Tensor | None,
    bias: Tensor | None, eps: float, offset: float, law: str, weight_offset: float, return_rows: bool,
) -> tuple:  # fmt: skip
    """The unchecked call with every operand."""
    flags = NORM_FLAGS[norm, law, weight_offset] | (0 if return_rows else NO_ROWS)
    args: tuple = (x, index.keep, index.inverse, scale, shift, weight, bias, eps, offset, flags)
    if not (0.0 <= eps < _INF and -_INF < offset < _INF) or (not return_rows and _call.wants_grad(args)):
        raise LookupError
    return _call.fast("gather_modulate", x, args)  # type: ignore[no-any-return]


def _token_rows(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    """Modulation of a sample or of every token."""
    _checks.modulation(name, t, x, None)
    if t is None:
        return None
    t = t[:, None] if t.dim() == 2 else t
    if t.shape[1] not in (1, x.shape[1]):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be (B, D), (B, 1, D) or (B, {x.shape[1]}, D)")
    return t


def scatter_merge(
    full: Tensor | None,
    rows: Tensor,
    index: TokenIndex,
    *,
    mode: str = "replace",
    gate: Tensor | None = None,
    mask_token: Tensor | None = None,
    pos: Tensor | None = None,
    lam: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Kept rows back among all tokens, in one pass; differentiable.

    Args:
        full: `(B, N, D)`: what the dropped tokens are, in the modes `"replace"` (TREAD's stash), `"add_gated"` and
            `"blend"`; None in the others.
        rows: `(B, K, D)` of the kept tokens, dtype of `full`.
        index: Which tokens they are.
        mode: `"replace"`: kept tokens are `rows`. `"add_gated"`: `full + gate * rows` (token routing around an MLP).
            `"mask_token"`: dropped tokens are `mask_token`, and `pos` is added to all (MDT, MaskDiT, MAE).
            `"blend"`: kept tokens are `lam * full + (1 - lam) * rows` (SpotEdit). `"zero"`: dropped tokens are zeros
            (MicroDiT), `pos` is added to all.
        gate: `(B, D)`, `(B, 1, D)` or `(B, K, D)`; batch 1 is for all samples; only for `"add_gated"`.
        mask_token: `(D,)`, or any shape of D elements; only for `"mask_token"`, which needs it.
        pos: `(N, D)`, `(1, N, D)` or `(B, N, D)`; for `"mask_token"` and `"zero"`.
        lam: 0 to 1; only for `"blend"`, which needs it.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, N, D)`, a new tensor.

    Raises:
        TypeError: As in `gather_rows`.
        ValueError: Shapes do not fit, an operand is missing or given to a mode that has none, or `backend` cannot run
            the call.
    """
    args: tuple
    if backend is None and not _call.tracing():
        try:
            if mode == "replace" and gate is mask_token is pos is lam is None:
                args = (full, rows, index.keep, index.inverse, None, None, None, 0.0, 0)
            else:
                args = _unchecked_merge(full, rows, index, mode, gate, mask_token, pos, lam)
            if full is None or full.shape[1] == index.inverse.shape[1]:
                return _call.fast("scatter_merge", rows, args)
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    _checks.choice("mode", mode, MERGES)
    rows = _checks.activation("rows", rows, "B, K, D")
    batch, kept, width = rows.shape
    index = _run.index_fits(index, batch, index.n if hasattr(index, "n") else 0, rows, "rows")
    if index.kept != kept:
        raise ValueError(f"rows has {kept} rows a sample; the index keeps {index.kept}")
    wanted = _OPERANDS[mode]
    given: dict[str, Any] = {"full": full, "gate": gate, "mask_token": mask_token, "pos": pos, "lam": lam}
    for name, value in given.items():
        if value is not None and name not in wanted:
            raise ValueError(f"{name} is given, but mode={mode!r} has none")
        if value is None and name in wanted and name not in ("gate", "pos"):
            raise ValueError(f"mode={mode!r} needs {name}")
    whole = (batch, index.n, width)
    if full is not None:
        full = _checks.activation("full", full)
        _checks.same_device("full", full, "rows", rows)
        if tuple(full.shape) != whole or full.dtype != rows.dtype:
            raise ValueError(f"full is {full.dtype} {tuple(full.shape)}; it must be {rows.dtype} {whole}")
    if gate is not None:
        gate = _checks.floating("gate", gate)
        gate = gate[:, None] if gate.dim() == 2 else gate
        _broadcast("gate", gate, (batch, kept, width), rows, middle=True)
    if mask_token is not None:
        mask_token = _checks.floating("mask_token", mask_token).reshape(-1)
        _checks.vector("mask_token", mask_token, width, rows)
    if pos is not None:
        pos = _checks.floating("pos", pos)
        pos = pos[None] if pos.dim() == 2 else pos
        _broadcast("pos", pos, whole, rows, middle=False)
    lam = 0.0 if lam is None else _run.number("lam", lam, 0.0, 1.0)
    operands = [_operand(t, rows) for t in (gate, mask_token, pos)]
    args = (_checks.dense_last(full), _checks.dense_last(rows), index.keep, index.inverse, *operands, lam, MERGES[mode])
    return _run.run("scatter_merge", args, rows.device, backend, rows.dtype)


def _unchecked_merge(
    full: Tensor | None, rows: Tensor, index: TokenIndex, mode: str, gate: Tensor | None, mask_token: Tensor | None,
    pos: Tensor | None, lam: float | None,
) -> tuple:  # fmt: skip
    """Arguments of the kernel; LookupError for operands that the mode does not have, or lacks."""
    wanted = _OPERANDS[mode]
    if (full is None) is ("full" in wanted) or (mask_token is None) is ("mask_token" in wanted):
        raise LookupError
    if (gate is not None and "gate" not in wanted) or (pos is not None and "pos" not in wanted):
        raise LookupError
    share = 0.0 if lam is None else lam
    if (lam is None) is ("lam" in wanted) or type(share) not in (float, int) or not 0.0 <= share <= 1.0:
        raise LookupError
    if gate is not None and gate.dim() == 2:
        gate = gate.unsqueeze(1)
    if mask_token is not None and mask_token.dim() != 1:
        mask_token = mask_token.reshape(-1)
    if pos is not None and pos.dim() == 2:
        pos = pos.unsqueeze(0)
    return full, rows, index.keep, index.inverse, gate, mask_token, pos, share, MERGES[mode]


def _broadcast(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, *, middle: bool) -> None:
    batch, n, width = shape
    fits = t.dim() == 3 and t.shape[0] in (1, batch) and t.shape[2] == width
    if not fits or t.shape[1] not in ((1, n) if middle else (n,)):
        forms = f"({batch}|1, {'1|' if middle else ''}{n}, {width})"
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {forms}")
    _checks.same_device(name, t, "rows", x)


def _operand(t: Tensor | None, rows: Tensor) -> Tensor | None:
    """An operand as the kernels take it: of the rows' dtype or fp32, last dim contiguous."""
    if t is None:
        return None
    if t.dtype not in (rows.dtype, torch.float32) and rows.dtype != torch.float64:
        t = t.float()
    return _checks.dense_last(t)
