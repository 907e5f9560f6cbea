"""What the interpreted Triton tests share: exact bf16 casts, poisoned memory, seeded operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
_EMULATED_CAST, _PATCH_LANGUAGE = interpreter._convert_float, interpreter._patch_lang
_PATCHED: set[tuple[str, ...]] = set()


def _cast(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
    """fp32 <-> bf16 to nearest even, as GPUs convert; Triton's interpreter drops the low half instead."""
    if source == tl.float32 and target == tl.bfloat16:
        t = torch.from_numpy(np.ascontiguousarray(data)).to(BF16)
        return t.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.uint32)
    return _EMULATED_CAST(data, source, target, mode)


def _patch_once(fn: object) -> object:
    """Triton exchanges all of triton.language at every call of a device function: three quarters of the time."""
    modules = tuple(sorted(name for name, value in fn.__globals__.items() if value in (tl, tl.core)))
    if modules not in _PATCHED:
        _PATCHED.add(modules)
        _PATCH_LANGUAGE(fn)
    return interpreter._LangPatchScope()  # empty: this process only interprets, so nothing is restored


interpreter._convert_float = _cast
interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so an element that a kernel forgets fails the comparison."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def as_tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


class Case:
    """Seeded random operands of one shape."""

    def __init__(self, seed: int, dtype: torch.dtype, shape: tuple[int, int, int],
                 mod_dtype: torch.dtype | None = None) -> None:  # fmt: skip
        self.g = torch.Generator().manual_seed(seed)
        self.dtype, self.shape, self.mod_dtype = dtype, shape, mod_dtype or dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.g).to(dtype or self.dtype)

    def x(self, layout: str = "dense") -> Tensor:
        batch, n, width = self.shape
        if layout == "sliced":  # a slice of tokens of a wider, longer tensor
            return self.normal(batch, n + 3, width + 8)[:, 2 : n + 2, :width]
        if layout == "transposed":
            return self.normal(n, batch, width).transpose(0, 1)
        if layout == "expanded":
            return self.normal(1, n, width).expand(batch, n, width)
        return self.normal(*self.shape)

    def mod(self, form: str | None) -> Tensor | None:
        """A modulation tensor; forms are those of the contract, `chunk` a strided view of a projection."""
        batch, n, width = self.shape
        if form is None:
            return None
        if form == "rows":
            return self.normal(5, width, dtype=self.mod_dtype)
        if form == "chunk":
            return self.normal(batch, 3 * width, dtype=self.mod_dtype).chunk(3, dim=1)[1]
        if form == "chunk3":
            return self.normal(batch, n, 2, width, dtype=self.mod_dtype)[:, :, 1]
        if form == "expanded":
            return self.normal(1, 1, width, dtype=self.mod_dtype).expand(batch, n, width)
        lead = {"BD": (batch,), "1D": (1,), "B1D": (batch, 1), "BFD": (batch, n // 2), "1FD": (1, n // 2),
                "BND": (batch, n), "1ND": (1, n)}[form]  # fmt: skip
        return self.normal(*lead, width, dtype=self.mod_dtype)

    def table(self, wanted: bool = True) -> Tensor | None:
        return self.normal(self.shape[2], dtype=self.mod_dtype) if wanted else None

    def vector(self, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.normal(self.shape[2], dtype=dtype) if wanted else None

    def rows(self, form: str | None) -> Tensor | None:
        if form is None:
            return None
        batch, n, _ = self.shape
        shape = (n,) if form == "N" else (batch, n)
        return torch.randint(0, 5, shape, generator=self.g, dtype=torch.int32)
