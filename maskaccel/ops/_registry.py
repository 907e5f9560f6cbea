"""Defines every op in its namespaces and makes autograd functions from one description.

Namespaces (one schema each):

* `maskaccel`: the public op. Differentiable, works on every device: the native kernel where there is one, else Triton
  (CUDA) or the reference (CPU).
* `maskaccel_raw`: the native kernels alone. No autograd key, hence the cheapest call; used by the Python API when no
  input needs a gradient, and inside the autograd functions.
* `maskaccel_triton`: the Triton kernels alone.

The native library implements `maskaccel` and `maskaccel_raw` for the keys CPU and CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACES = ("maskaccel", "maskaccel_raw", "maskaccel_triton")
_LIBRARIES = {ns: torch.library.Library(ns, "FRAGMENT") for ns in NAMESPACES}


@dataclass(frozen=True)
class OpSpec:
    """One op: its schema, how shapes come out, and how it is differentiated.

    Attributes:
        name: Name within each namespace.
        schema: Arguments and results, without the name.
        fake: Shape function, same arguments as the op.
        save: `(inputs, output) -> tensors` that backward needs, in the order `backward` takes them after the gradients,
            or None for an op without a derivative.
        backward: `(namespace, plain, needs, saved, grads) -> gradients`, one entry per input; `plain` are the inputs
            with None in place of tensors.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    save: Callable[[tuple, Any], Sequence[torch.Tensor | None]] | None = None
    backward: Callable[..., tuple] | None = None


SPECS: dict[str, OpSpec] = {}
BARE_SPECS: dict[str, OpSpec] = {}  # of bare ops with a derivative


def define(spec: OpSpec) -> None:
    """Define `spec` in all namespaces, with its fake and (in `maskaccel`) its derivative."""
    SPECS[spec.name] = spec
    for ns, library in _LIBRARIES.items():
        library.define(spec.name + spec.schema)
        torch.library.register_fake(f"{ns}::{spec.name}", _on_one_device(spec.fake), lib=library)
    if spec.backward is not None:
        function = _autograd_parts(spec, "maskaccel")
        torch.library.register_autograd(
            f"maskaccel::{spec.name}", function.backward_rule, setup_context=function.setup, lib=_LIBRARIES["maskaccel"]
        )
    elif _writes(spec):
        _LIBRARIES["maskaccel"].impl(spec.name, _refuse_inputs(spec.name), "Autograd")
    else:
        # Without a rule torch would let gradients end here in silence.
        torch.library.register_autograd(f"maskaccel::{spec.name}", _refuse(spec.name), lib=_LIBRARIES["maskaccel"])


def define_bare(
    name: str, schema: str, fake: Callable[..., Any], unpacked: Callable[[int], dict[str, Any]] | None = None
) -> None:
    """Define an op in `maskaccel_raw` alone: another way to call the kernel of an op, with fewer arguments.

    Args:
        name: That of the whole op, and `_bare`.
        schema: Some of the tensors of the whole op, and one number that stands for all of its numbers.
        fake: As in `OpSpec`.
        unpacked: The numbers of the whole op by name, from that number. None: the bare op has no derivative.
    """
    library = _LIBRARIES["maskaccel_raw"]
    library.define(name + schema)
    torch.library.register_fake(f"maskaccel_raw::{name}", _on_one_device(fake), lib=library)
    if unpacked is not None:
        BARE_SPECS[name] = _bare_spec(schema, fake, SPECS[name.removesuffix("_bare")], unpacked)


def _bare_spec(
    schema: str, fake: Callable[..., Any], whole: OpSpec, unpacked: Callable[[int], dict[str, Any]]
) -> OpSpec:
    """The derivative of a bare op is that of the whole op, whose other arguments are absent."""
    names, tensors = _argument_names(whole.schema), _leading_tensors(whole.schema)
    at = [names.index(own) for own in _argument_names(schema)[:-1]]
    unread = (None,) * (_results(whole.schema) - _results(schema))
    assert whole.save is not None and whole.backward is not None
    whole_save, whole_backward = whole.save, whole.backward

    @functools.lru_cache(maxsize=1024)
    def numbers(packed: int) -> tuple:
        values = unpacked(packed)
        return tuple(values[number] for number in names[tensors:])

    def spread(values: tuple, absent: Any) -> list:
        full = [absent] * tensors
        for place, value in zip(at, values, strict=False):  # the number at the end has no place
            full[place] = value
        return full

    def save(inputs: tuple, output: Any) -> Sequence[torch.Tensor | None]:
        return whole_save((*spread(inputs, None), *numbers(inputs[-1])), (*output, *unread) if unread else output)

    def backward(namespace: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
        rest = numbers(plain[-1])
        whole_needs = (*spread(needs, False), *(False for _ in rest))
        found = whole_backward(namespace, (None,) * tensors + rest, whole_needs, saved, (*grads, *unread))
        return (*(found[place] for place in at), None)

    return OpSpec(whole.name, schema, fake, save, backward)


def _argument_names(schema: str) -> list[str]:
    return [part.split("=")[0].split()[-1] for part in schema[1 : schema.index(") ->")].split(",")]


def _results(schema: str) -> int:
    return schema[schema.index("->") :].count("Tensor")


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A shape function that refuses tensors of several devices.

    One meta tensor among others is enough for torch to call it instead of the kernel: the result would be memory that
    nobody wrote.
    """

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        devices = {value.device for value in args if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"tensors on {', '.join(sorted(map(str, devices)))}; they must be on one device")
        return fake(*args)

    return checked


def _refuse(name: str) -> Callable[..., tuple]:
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(f"torch.ops.maskaccel.{name} has no derivative; call it under torch.no_grad()")

    return backward


def _writes(spec: OpSpec) -> bool:
    return "!" in spec.schema


def _refuse_inputs(name: str) -> Callable[..., Any]:
    """What autograd calls for an op that writes an argument: torch takes no derivative rule for one."""

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in args):
            raise RuntimeError(f"torch.ops.maskaccel.{name} has no derivative; call it under torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return op("maskaccel", name)(*args)

    return kernel


def implement(namespace: str, name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register a Python kernel for one dispatch key ("CPU", "CUDA")."""
    _LIBRARIES[namespace].impl(name, kernel, key)


def implemented(namespace: str, name: str, device_type: str) -> bool:
    """Whether the op is defined in `namespace` and has a kernel there for tensors on a CPU or a GPU."""
    key, full = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type), f"{namespace}::{name}"
    if key is None or not torch._C._dispatch_has_kernel(full):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(full, key))


def op(namespace: str, name: str) -> Any:
    """The overload `torch.ops.<namespace>.<name>.default`."""
    return getattr(getattr(torch.ops, namespace), name).default


def quick(overload: Any) -> Callable[..., Any]:
    """What calling an overload calls, one Python frame further."""
    return getattr(overload, "_op", overload)  # type: ignore[no-any-return]


class _Once(torch.autograd.Function):
    """A backward pass whose own derivative is refused. Cut off from the graph it would count as zero instead."""

    @staticmethod
    def forward(name: str, run: Callable[..., tuple], *tensors: torch.Tensor | None) -> tuple:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise RuntimeError(f"{ctx.name} can be differentiated once; for higher derivatives use backend='reference'")


@dataclass(frozen=True)
class _Parts:
    setup: Callable[..., None]
    backward_rule: Callable[..., tuple]


def _autograd_parts(spec: OpSpec, namespace: str) -> _Parts:
    save, backward = spec.save, spec.backward
    assert save is not None and backward is not None
    tensors = _leading_tensors(spec.schema)
    no_tensors = (None,) * tensors

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*save(inputs, output))
        # Saving the inputs as such would keep tensors alive that the backward does not read.
        ctx.plain = no_tensors + inputs[tensors:]
        ctx.set_materialize_grads(False)

    def backward_rule(ctx: Any, *grads: Any) -> tuple:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return backward(namespace, ctx.plain, ctx.needs_input_grad, saved, grads)
        plain, needs, count = ctx.plain, ctx.needs_input_grad, len(saved)

        def run(*tensors: torch.Tensor | None) -> tuple:
            return backward(namespace, plain, needs, tensors[:count], tensors[count:])

        return _Once.apply(spec.name, run, *saved, *grads)

    return _Parts(setup, backward_rule)


def _leading_tensors(schema: str) -> int:
    """How many arguments are tensors; all of them come before the numbers."""
    kinds = [part.strip().startswith("Tensor") for part in schema[: schema.index("->")].split(",")]
    kinds[0] = schema.startswith("(Tensor")
    assert kinds == sorted(kinds, reverse=True), schema
    return sum(kinds)


@functools.cache
def autograd_function(namespace: str, name: str) -> type[torch.autograd.Function]:
    """The op of `namespace` as an autograd function (half the cost of the dispatcher's autograd key)."""
    spec = BARE_SPECS[name] if name in BARE_SPECS else SPECS[name]
    if spec.backward is None:
        raise RuntimeError(f"{name} has no derivative; call it under torch.no_grad()")
    parts, kernel = _autograd_parts(spec, namespace), quick(op(namespace, name))

    def forward(*args: Any) -> Any:
        return kernel(*args)

    members = {"forward": forward, "setup_context": parts.setup, "backward": parts.backward_rule}
    # Named when it is made: torch takes the name of the node in the graph from then.
    kind = type(torch.autograd.Function)
    static = {member: staticmethod(function) for member, function in members.items()}
    return kind(f"{name}_{namespace}", (torch.autograd.Function,), static)  # type: ignore[misc,no-any-return]


@functools.cache
def direct(namespace: str, name: str) -> Callable[..., Any]:
    """`autograd_function(...).apply` where nothing traces or transforms the call.

    What `apply` does beside is to bind arguments by their names, which these have none of: 10 us.
    """
    return super(torch.autograd.Function, autograd_function(namespace, name)).apply  # type: ignore[misc,no-any-return]


def differentiable(namespace: str, name: str, args: tuple) -> Any:
    """The call of an op of `namespace` under autograd."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return autograd_function(namespace, name).apply(*args)
    return direct(namespace, name)(*args)
