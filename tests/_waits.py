"""Where a program waits for the device: what fails there on a GPU, and what stands in for it on meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _NoUploads(TorchFunctionMode):
    """On meta tensors every read raises by itself; this also refuses copies from the host that a GPU waits for."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor"):
            self._refuse(name, args[0], out)
        elif name in ("to", "cuda", "copy_", "type_as") and not kwargs.get("non_blocking"):
            self._refuse(name, *((args[1], args[0]) if name == "copy_" else (args[0], out)))
        elif name in ("__getitem__", "__setitem__"):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, list) or (isinstance(index, Tensor) and index.dim()):
                    self._refuse(name, index, args[0])
        return out

    @staticmethod
    def _refuse(name: str, value: Any, to: Any) -> None:
        if isinstance(to, Tensor) and to.is_meta and not (isinstance(value, Tensor) and value.is_meta):
            raise RuntimeError(f"{name}: a copy from the host to a meta tensor, which a GPU waits for")


def no_waiting(device: str) -> contextlib.AbstractContextManager:
    """Fails where the device is waited for: on a GPU by torch's own check, on "meta" as if it were one."""
    if device == "cpu":
        return contextlib.nullcontext()
    return _NoUploads() if device == "meta" else _errors()
