"""Edits of live objects that are made together and undone exactly."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BASE = "_maskaccel_base_forward"
CHAIN = "_maskaccel_forward_chain"
COMPILED = "_maskaccel_compiled_forward"
NO_PICKLE = "a patched model cannot be pickled: remove() the patch first, or save its state_dict()"


class PatchError(RuntimeError):
    """A patch could not be applied; nothing was changed."""


class _MISSING:
    """In place of a value: the attribute was not there. A class, because copies of an object() lose their identity."""


@dataclass
class _Edit:
    """One instance attribute: its new value, and what its `__dict__` held before."""

    owner: Any
    name: str
    value: Any
    before: Any = _MISSING
    applied: bool = False

    def apply(self) -> None:
        self.before = self.owner.__dict__.get(self.name, _MISSING)
        # Written to __dict__: nn.Module.__setattr__ would register modules and parameters.
        self.owner.__dict__[self.name] = self.value
        self.applied = True

    def undo(self) -> str | None:
        """Restore, unless somebody else replaced our value since; then say so and leave theirs."""
        if self.owner.__dict__.get(self.name, _MISSING) is not self.value:
            return f"{type(self.owner).__name__}.{self.name} was replaced by someone else after the patch; left alone"
        if self.before is _MISSING:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.before
        self.applied = False
        return None


@dataclass
class _Hook:
    """A forward pre-hook that is given the call's keyword arguments too; PyTorch removes it by its handle."""

    owner: nn.Module
    hook: Callable[..., None]
    handle: Any = None
    applied: bool = False

    def apply(self) -> None:
        self.handle = self.owner.register_forward_pre_hook(self.hook, with_kwargs=True)
        self.applied = True

    def undo(self) -> None:
        self.handle.remove()
        self.handle, self.applied = None, False


@dataclass
class _Forward:
    """What becomes of the forward of one module: a replacement of its own, and wrappers before it."""

    module: nn.Module
    replacement: Callable[..., Any] | None = None
    wrappers: list[Callable[..., Any]] = field(default_factory=list)


@dataclass
class Transaction:
    """A list of edits. `commit` applies all or none; `undo` restores all in reverse order."""

    edits: list[_Edit | _Hook] = field(default_factory=list)
    claimed: dict[tuple[int, str], str] = field(default_factory=dict)
    forwards: dict[int, _Forward] = field(default_factory=dict)
    derived: list[tuple[Any, str, Callable[[Any], Any]]] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any, claimant: str) -> None:
        """Plan `owner.<name> = value` on the instance. Two claimants of one attribute are an error."""
        self.claim(owner, name, claimant)
        self.edits.append(_Edit(owner, name, value))

    def derive(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Plan `owner.<name> = make(value)` of the value that it holds, or that `set` plans for it before or after."""
        self.derived.append((owner, name, make))

    def pre_hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Plan `hook(module, args, kwargs)` before every call of the module; unlike a wrapper it is part of graphs."""
        self.edits.append(_Hook(module, hook))

    def claim(self, owner: Any, name: str, claimant: str) -> None:
        """Reserve something of an object, an attribute or what else has a name, for one method.

        Raises:
            PatchError: Another one has it.
        """
        key = (id(owner), name)
        if key in self.claimed:
            raise PatchError(
                f"{claimant} and {self.claimed[key]} both want {name} of one {type(owner).__name__}; use one of them"
            )
        self.claimed[key] = claimant

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any], claimant: str) -> None:
        """Plan a new forward for this instance; `forward(self, *args, **kwargs)` is a plain function.

        A bound method survives deepcopy (it is bound to the copy), and pickling where `forward` is importable.
        """
        held = module.__dict__.get("forward")
        # A hook that was removed may leave the class's own forward behind as an instance attribute.
        if held is not None and getattr(held, "__func__", None) is not type(module).forward:
            raise PatchError(hooked(module))
        self.claim(module, "forward", claimant)
        self.forwards.setdefault(id(module), _Forward(module)).replacement = forward

    def wrap_forward(
        self, module: nn.Module, wrapper: Callable[..., Any], *, outermost: bool = False, below: type | None = None
    ) -> None:
        """Plan a wrapper, `wrapper(self, inner, *args, **kwargs)`, before the forward; hooks below it stay.

        `inner(*args, **kwargs)` is the next wrapper, and at last the module's own forward, or its replacement.
        Wrappers planned first stand outermost, unless a later one asks to; it may name a class of wrappers (`below`)
        that it stands inside of nevertheless.
        """
        wrappers = self.forwards.setdefault(id(module), _Forward(module)).wrappers
        around = [i for i, one in enumerate(wrappers) if below is not None and isinstance(one, below)]
        wrappers.insert(max(around, default=-1) + 1 if outermost else len(wrappers), wrapper)

    def commit(self) -> None:
        """Apply every edit, or none if one fails."""
        for owner, name, make in self.derived:
            planned = next(
                (e for e in self.edits if isinstance(e, _Edit) and e.owner is owner and e.name == name), None
            )
            if planned is None:
                planned = _Edit(owner, name, getattr(owner, name))
                self.edits.append(planned)
            planned.value = make(planned.value)
        self.derived.clear()
        for one in self.forwards.values():
            self.edits += _forward_edits(one)
        wrapped = {key: one.module for key, one in self.forwards.items() if one.wrappers}
        around = {id(m): m for module in wrapped.values() for m in _around(module, set(wrapped))}
        for module in (wrapped | around).values():
            self.edits.append(_Edit(module, "compile", types.MethodType(compile_inside, module)))
        self.forwards.clear()
        try:
            for edit in self.edits:
                edit.apply()
        except Exception:
            self.undo()
            raise

    def undo(self) -> list[str]:
        """Restore everything; returns what could not be restored, in words."""
        notes = [edit.undo() for edit in reversed(self.edits) if edit.applied]
        return [note for note in notes if note is not None]


def _forward_edits(plan: _Forward) -> list[_Edit]:
    module = plan.module
    edits: list[_Edit] = []
    base = module.__dict__.get("forward")
    if plan.replacement is not None:
        base = types.MethodType(plan.replacement, module)
    if not plan.wrappers:
        return [_Edit(module, "forward", base)]
    if base is not None:
        edits.append(_Edit(module, BASE, base))
    edits.append(_Edit(module, CHAIN, tuple(plan.wrappers)))
    edits.append(_Edit(module, COMPILED, _Compiled()))
    edits.append(_Edit(module, "forward", types.MethodType(_chained(type(module)), module)))
    return edits


def _around(module: nn.Module, wrapped: set[int]) -> list[nn.Module]:
    """The modules of a tree that hold wrapped ones."""
    found = [m for child in module.children() for m in _around(child, wrapped)]
    if found or any(id(child) in wrapped for child in module.children()):
        found.append(module)
    return found


@functools.cache
def _chained(cls: type[nn.Module]) -> Callable[..., Any]:
    """A forward that runs the chain, with the signature of the class's: callers inspect it to choose what to pass."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(self, 0, *args, **kwargs)

    # Decisions stay outside of graphs (`compile_inside`): where somebody compiles the whole model, its graph breaks
    # here instead of taking them for constants. torch.compiler.disable sets this too, but imports the compiler.
    forward._torchdynamo_disable = True  # type: ignore[attr-defined]
    return forward


def _call(module: nn.Module, position: int, /, *args: Any, **kwargs: Any) -> Any:
    chain = module.__dict__[CHAIN]
    last = position + 1 == len(chain)
    inner = base_forward(module) if last else functools.partial(_call, module, position + 1)
    return chain[position](module, inner, *args, **kwargs)


class _Compiled:
    """The compiled forward of a module, once somebody compiles it. A copy of a model is not compiled."""

    forward: Callable[..., Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled()


def compile_inside(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In place of `nn.Module.compile` on wrapped modules: compiles what the wrappers stand before.

    The wrappers decide in Python at every step; in a graph each decision would be a constant, and compiled anew.
    Modules inside that are wrapped too are compiled in place of this one.
    """
    inside = [m for m in self.modules() if m is not self and CHAIN in m.__dict__]
    if not inside:
        self.__dict__[COMPILED].forward = torch.compile(_uncompiled(self), *args, **kwargs)
    for module in inside:
        module.compile(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether somebody compiled a module, or what wrappers stand before."""
    held = module.__dict__.get(COMPILED)
    return module._compiled_call_impl is not None or (held is not None and held.forward is not None)


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the wrappers of a module stand before."""
    compiled = module.__dict__[COMPILED].forward
    return _uncompiled(module) if compiled is None else compiled


def _uncompiled(module: nn.Module) -> Callable[..., Any]:
    base = module.__dict__.get(BASE)
    if base is not None:
        return base
    kind: Any = type(module)
    return types.MethodType(kind.forward, module)


def hooked(module: nn.Module) -> str:
    """Why a module with a forward of its own is not replaced."""
    held = module.__dict__["forward"]
    by = type(held).__module__.split(".")[0] if not isinstance(held, types.MethodType) else held.__func__.__module__
    return (
        f"{type(module).__name__} already has a forward of its own (set by {by}): a hook for offload, caching or "
        "casting, or another patch. Patch first, then enable the hook"
    )
