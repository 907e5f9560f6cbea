"""The model that a command works on: the bundled example, a pipeline in a folder, or what a function of yours makes."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .demo import DemoError, _load_module, find_example

# Runs one denoising run: the measurement (or patch), the number of the run.
Run = Callable[[Any, int], Any]


def load_target(
    model: str | None, steps: int, calls: dict[str, Any], device: str | None = None, dtype: str | None = None
) -> tuple[Any, Run]:
    """The target, and what runs it once.

    Args:
        model: None is the bundled example. A folder with a `model_index.json` is a diffusers pipeline.
            `"module:function"` is called, and gives a pipeline, `(pipeline, arguments of its call)`, or
            `(model, run)`, where `run(measurement, number)` does one denoising run of the model.
        steps: Sampling steps of a pipeline.
        calls: More arguments of the pipeline's call.
        device: Where a pipeline from a folder runs; None takes CUDA where there is one.
        dtype: Name of its dtype; None is float32 on a CPU, bfloat16 elsewhere.

    Raises:
        ValueError: `model` is none of these.
        DemoError: The example or diffusers is missing.
    """
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("float32" if where == "cpu" else "bfloat16"), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no dtype, such as float32 or bfloat16")
    if model is not None and not Path(model).exists():
        if ":" in model:
            return _from_function(model, steps, calls)
        raise ValueError(f"model={model!r} is no folder, and no module:function")
    pipeline, arguments = _from_folder(model, kind)
    pipeline.to(where)
    return pipeline, _runner(pipeline, steps, arguments | calls)


def _from_folder(folder: str | None, dtype: Any) -> tuple[Any, dict[str, Any]]:
    try:
        import diffusers
    except ImportError as error:
        raise DemoError("this needs diffusers: pip install 'maskaccel[diffusers]'") from error
    from torch import nn

    diffusers.utils.logging.disable_progress_bar()
    index = Path(folder or ".") / "model_index.json"
    if folder is None or not index.is_file() or json.loads(index.read_text()).get("_class_name") == "FashionPipeline":
        try:
            example = find_example(folder)
        except DemoError:
            if folder is None:
                raise
            raise ValueError(f"model={folder!r} has no model_index.json, so it is no diffusers pipeline") from None
        made = _load_module(example.code / "pipeline.py").FashionPipeline
        pipeline = made.from_pretrained(example.weights, local_files_only=True)
        nn.Module.to(pipeline.transformer, dtype)
        return pipeline, {"class_labels": list(range(pipeline.num_classes))}
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=dtype), {}


def _from_function(name: str, steps: int, calls: dict[str, Any]) -> tuple[Any, Run]:
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working directory, as with `python -m`
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={name!r}: {error}") from None
    target, second = made if isinstance(made, tuple) else (made, {})
    if callable(second):
        if calls:
            raise ValueError(f"--call {next(iter(calls))}=...: {name} runs its model itself")
        return target, second
    return target, _runner(target, steps, dict(second) | calls)


def _runner(pipeline: Any, steps: int, arguments: dict[str, Any]) -> Run:
    import torch

    accepted = inspect.signature(type(pipeline).__call__).parameters
    for name in arguments:
        if name not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            raise ValueError(f"{type(pipeline).__name__} takes no argument {name}; it takes {', '.join(accepted)}")
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)

    def run(_: Any, number: int) -> Any:
        more = {"generator": torch.Generator().manual_seed(number)} if "generator" in accepted else {}
        return pipeline(**(more | {"num_inference_steps": steps} | arguments))

    return run
