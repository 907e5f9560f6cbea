"""Shared by the tests of all model families.

A builder is a function without arguments that returns `(model, kwargs)` in fp32, made with `made`.
`check_parity(builder)` then compares the patched model with the original under the error rule, outputs and gradients,
and checks the promises of `patch`.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _numerics import FACTOR, assert_close_to_truth
from torch import Tensor, nn

import maskaccel
from maskaccel.methods import FusedAdaLN

Built = tuple[nn.Module, dict[str, Any]]

# Positions, tables and masks keep their dtype when a model is cast, and get no gradient check.
_POSITIONAL = ("rotary", "rope", "freqs", "ids", "indices", "pos", "mask")
_NOT_DIFFERENTIATED = (*_POSITIONAL, "timestep", "guidance", "scale", "coords", "fps")


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values that depend on the seed and shape only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Integers below `high` that depend on the seed and shape only."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def made(cls: Callable[..., nn.Module], seed: int = 0, *, spread: float = 0.2, **config: Any) -> nn.Module:
    """`cls(**config)` in eval mode with reproducible weights, none of them zero.

    Models start with zero gates and unit norm weights, which hide errors: every parameter that is all zero is
    randomised, and norm weights that are all one are spread around one.
    """
    torch.manual_seed(seed)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, spread / 2 if parameter.ndim > 1 else spread)
            elif parameter.ndim == 1 and bool((parameter == 1).all()):
                parameter.normal_(1, spread)
    return model


def as_dtype(model: nn.Module, kwargs: Mapping[str, Any], dtype: torch.dtype) -> Built:
    """A copy of the model and its inputs in `dtype`, with the fp32 islands that `from_pretrained` keeps."""
    model = copy.deepcopy(model)
    keep = getattr(model, "_keep_in_fp32_modules", None) or []
    narrow = dtype not in (torch.float32, torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (narrow and any(part in name.split(".") for part in keep)):
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not (narrow and any(word in name for word in ("rope", "freqs", "pos"))):
            buffer.data = buffer.data.to(dtype)
    return model, {key: _cast(key, value, dtype) for key, value in kwargs.items()}


def _cast(key: str, value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        kept = dtype != torch.float64 and any(word in key.replace("pose_", "") for word in _POSITIONAL)
        return value.clone() if kept else value.to(dtype, copy=True)
    if isinstance(value, dict):
        return {name: _cast(name, item, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(key, item, dtype) for item in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every floating tensor in nested outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def run(model: nn.Module, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Outputs of one call without gradients."""
    with torch.no_grad():
        return tensors_of(model(**_arguments(model, kwargs)))


def _arguments(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(kwargs)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        given["return_dict"] = False
    return given


def run_with_gradients(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by name of all inputs and parameters that take part, for a fixed random cotangent."""
    given = _arguments(model, kwargs)
    leaves: dict[str, Tensor] = {}
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not any(w in key for w in _NOT_DIFFERENTIATED):
            given[key] = leaves[f"input {key}"] = value.detach().clone().requires_grad_()
    leaves |= {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.requires_grad}
    with torch.enable_grad():
        outputs = tensors_of(model(**given))
        # Products with a random cotangent: a plain sum would not see errors that cancel.
        terms = [(o * randn(*o.shape, seed=7 + i).to(o.dtype)).sum() for i, o in enumerate(outputs) if o.requires_grad]
        loss = torch.stack([term.double() for term in terms]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return [o.detach() for o in outputs], named


def _run_without_gradients(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    return run(model, kwargs), {}


def assert_gradients_close(got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """The error rule for named gradients, in units of each gradient's own RMS.

    Small tensors have too few elements for their own error to be a fair yardstick, so each may use the error of all.
    """
    assert set(got) == set(plain) == set(truth), set(got) ^ set(truth)
    errors: dict[str, tuple[float, float]] = {}
    squares = count = 0.0
    for name, reference in truth.items():
        assert got[name].dtype == plain[name].dtype, f"gradient of {name}: {got[name].dtype}, not {plain[name].dtype}"
        assert got[name].shape == reference.shape, f"gradient of {name}: shape {tuple(got[name].shape)}"
        unit = reference.double().square().mean().sqrt().item()
        if unit < 1e-9:  # nothing reaches it but rounding
            continue
        mine, theirs = (((g[name].double() - reference) / unit).square().mean().sqrt().item() for g in (got, plain))
        errors[name] = (mine, theirs)
        squares, count = squares + theirs**2, count + 1
    assert errors, "no gradient to compare"
    typical = (squares / count) ** 0.5
    for name, (mine, theirs) in errors.items():
        slack = 4 * torch.finfo(got[name].dtype).eps
        allowed = FACTOR * max(theirs, typical) + slack
        assert mine <= allowed, f"gradient of {name}: error {mine:.3e}, plain torch {theirs:.3e} ({typical:.3e} of all)"


def check_parity(
    build: Callable[[], Built],
    *,
    methods: Any = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    gradients: bool = True,
    expect: Mapping[str, int] | None = None,
    skipped: int = 0,
    copies: bool = True,
) -> maskaccel.PatchReport:
    """Compare a patched model with the original, and check what `patch` promises.

    Args:
        build: Makes the model and the arguments of its forward, in fp32.
        methods: What to patch with; None is `FusedAdaLN()`.
        dtypes: Dtypes to run in.
        gradients: Also compare gradients of inputs and parameters.
        expect: Number of sites by action, such as `{"fused block": 2}`; exact. Actions not named are not looked at.
        skipped: Number of sites that the report may say were left as they are.
        copies: Also check that a deepcopy of the patched model gives the same.

    Returns:
        The report of the last dtype.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    try:
        return _check_parity(build, methods, dtypes, gradients, expect, skipped, copies)
    finally:
        torch.set_num_threads(threads)


def _check_parity(
    build: Callable[[], Built],
    methods: Any,
    dtypes: Sequence[torch.dtype],
    gradients: bool,
    expect: Mapping[str, int] | None,
    skipped: int,
    copies: bool,
) -> maskaccel.PatchReport:
    original, inputs = build()
    report = None
    for dtype in dtypes:
        model, kwargs = as_dtype(original, inputs, dtype)
        truth_model, truth_kwargs = as_dtype(*as_dtype(original, inputs, dtype), torch.float64)
        keys = list(model.state_dict())
        call = run_with_gradients if gradients else _run_without_gradients
        before = run(model, kwargs)
        plain, plain_grads = call(model, kwargs)
        truth, truth_grads = call(truth_model, truth_kwargs)

        patch = maskaccel.patch(model, FusedAdaLN() if methods is None else methods)
        assert list(model.state_dict()) == keys, "the patch changed parameter names"
        got, got_grads = call(model, kwargs)
        inference = run(model, kwargs)
        for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
            assert_close_to_truth(g, p, t.double(), what=f"output {i} in {dtype}")
            assert_close_to_truth(inference[i], before[i], t.double(), what=f"output {i} in {dtype} without gradients")
        if gradients:
            assert_gradients_close(got_grads, plain_grads, truth_grads)
        if copies:
            copied = run(copy.deepcopy(model), kwargs)
            assert all(map(torch.equal, copied, inference)), "a deepcopy gives something else"

        report = patch.report()
        check_report(report, expect, skipped)
        patch.remove()
        assert all(map(torch.equal, run(model, kwargs), before)), "remove() did not restore the model"
    assert report is not None
    return report


def check_report(report: maskaccel.PatchReport, expect: Mapping[str, int] | None = None, skipped: int = 0) -> None:
    """Check counts of sites by action, that not more than `skipped` were left, and that the fused code ran."""
    found: Counter[str] = Counter()
    for (_, _, action), count in report.sites.items():
        found[action] += count
    for action, count in (expect or {}).items():
        assert found[action] == count, f"{action}: {found[action]}, expected {count}\n{report}"
    assert sum(report.skipped.values()) <= skipped, f"more skipped than {skipped}\n{report}"
    fused = report.activity.get("FusedAdaLN", {})
    if found["fused block"] or found["fused norm"]:
        assert fused.get("fused calls"), f"the fused code never ran\n{report}"
