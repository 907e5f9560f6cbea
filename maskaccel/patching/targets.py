"""Which models a patch target holds."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .transaction import PatchError


def find_models(target: Any) -> tuple[list[nn.Module], Any | None]:
    """The transformers of a pipeline (its `model` where it has none), or the module itself.

    Returns:
        The models, and the pipeline (None for a module).

    Raises:
        PatchError: The target is neither, the pipeline holds no transformer, or a model is compiled or wrapped.
    """
    if isinstance(target, nn.Module):
        return [_not_compiled(target)], None
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise PatchError(
            f"target is a {type(target).__name__}; allowed are a diffusers pipeline (anything with `components`) "
            "or a torch.nn.Module"
        )
    models = [m for name, m in components.items() if isinstance(m, nn.Module) and "transformer" in name]
    if not models and isinstance(components.get("model"), nn.Module):  # diffusion language models
        models = [components["model"]]
    if not models:
        names = ", ".join(f"{name} ({type(value).__name__})" for name, value in components.items())
        raise PatchError(f"{type(target).__name__} holds no component named transformer* or model; it holds {names}")
    return [_not_compiled(model) for model in models], target


def _not_compiled(model: nn.Module) -> nn.Module:
    """The model, or PatchError: compiled code does not see a patch that comes after it, and wrappers have no blocks."""
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise PatchError(
            f"{type(model).__name__} wraps a {type(model.module).__name__}: patch that one, before it is wrapped where "
            "a method has parameters: they are to be wrapped with it"
        )
    for module in model.modules():
        if _is_optimized(module) or module._compiled_call_impl is not None:
            raise PatchError(f"{type(model).__name__}: {type(module).__name__} is compiled; patch first, compile after")
    return model


def _is_optimized(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made it; asked without importing the compiler."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
