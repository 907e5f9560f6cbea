"""Copies of the functions that lead to an attention, in which the attention function is replaced and nothing else.

`scaled_dot_product_attention` and diffusers' `dispatch_attention_fn` are found wherever a function reads them: in the
globals of its module (imported, or as attributes of `torch.nn.functional` under any name), in closures, in helper
functions, in attributes of the instance, and in transformers' tables of attention functions. In a copy they are
functions that ask whose attention is being computed.
"""

from __future__ import annotations

import dis
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SITE = "_maskaccel_attention"  # attribute of a module or processor that holds what takes over its attention


class _Current(threading.local):
    """The site whose attention module this thread is in."""

    def __init__(self) -> None:
        # Set in every thread before it is asked for: whether an attribute is there is something that graphs guard.
        self.bridged: Any = None


_CURRENT = _Current()


def _sdpa(*args: Any, **kwargs: Any) -> Any:
    bridged = _CURRENT.bridged
    attention = F.scaled_dot_product_attention
    return attention(*args, **kwargs) if bridged is None else bridged.attend(attention, True, args, kwargs)


@functools.cache
def _dispatched(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch_attention_fn(*args: Any, **kwargs: Any) -> Any:
        bridged = _CURRENT.bridged
        return attention(*args, **kwargs) if bridged is None else bridged.attend(attention, False, args, kwargs)

    return dispatch_attention_fn


_DISPATCH = "dispatch_attention_fn"
_SDPA = "scaled_dot_product_attention"
_TABLE = "get_interface"  # by which models of transformers ask a table for the attention that their config names
_OPAQUE = ("torch.", "maskaccel.ops")  # modules whose functions are left as they are


def _replacement(value: Any) -> Callable[..., Any] | None:
    """What stands in for an attention function; None for anything else."""
    if value is F.scaled_dot_product_attention:
        return _sdpa
    if isinstance(value, types.FunctionType) and value.__name__ == _DISPATCH and value.__module__ != __name__:
        return _dispatched(value)
    return None


class _Table:
    """Stands in for a table of attention functions of transformers: what it gives has attention replaced."""

    def __init__(self, table: Any, code: Code) -> None:
        # Copied now: in a graph a function is looked up, not made.
        self._table = table
        self._copies = {value: code.copy(value) for value in table.values() if code.leads(value)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The function of a name."""
        found = self._table.get_interface(*args, **kwargs)
        return self._copies.get(found, found)


def _is_table(value: Any) -> bool:
    return hasattr(type(value), _TABLE) and type(value).__module__.startswith("transformers.")


class Code:
    """Copies of functions in which the attention functions are replaced, each made once."""

    def __init__(self) -> None:
        self._leads: dict[types.FunctionType, bool] = {}
        self._copies: dict[types.FunctionType, types.FunctionType] = {}
        self._spaces: dict[int, dict[str, Any]] = {}
        self._modules: dict[types.ModuleType, types.ModuleType] = {}
        self._entries: dict[tuple[type, str], Callable[..., Any]] = {}
        self._classes: dict[type, type] = {}

    def leads(self, value: Any) -> bool:
        """Whether a value is an attention function, or a function whose code leads to one."""
        if _replacement(value) is not None:
            return True
        if not isinstance(value, types.FunctionType) or (value.__module__ or "").startswith(_OPAQUE):
            return False
        if value not in self._leads:
            self._leads[value] = False  # while it is being found out: functions may call each other
            names, attributes = _read(value.__code__)
            globals_ = [value.__globals__[name] for name in names if name in value.__globals__]
            through = any(isinstance(g, types.ModuleType) and self._is_way(g, attributes) for g in globals_)
            through = through or (_TABLE in attributes and any(map(_is_table, globals_)))
            self._leads[value] = through or any(self.leads(v) for v in (*globals_, *(c for _, c in _cells(value))))
        return self._leads[value]

    @staticmethod
    def _is_way(module: types.ModuleType, attributes: set[str]) -> bool:
        """Whether reading these attributes may end, from this module, at an attention function."""
        if module is torch:
            return {"nn", "functional", _SDPA} <= attributes
        if module is nn:
            return {"functional", _SDPA} <= attributes
        return any(name in attributes and _replacement(vars(module).get(name)) for name in (_SDPA, _DISPATCH))

    def copy(self, value: Any) -> Any:
        """The value with attention replaced; itself if it does not lead there."""
        found = _replacement(value)
        if found is not None:
            return found
        if not self.leads(value):
            return value
        space = self._space(value)
        if value not in self._copies:
            closure = tuple(types.CellType(self.copy(c)) if self.leads(c) else cell for cell, c in _cells(value))
            # Code of its own: the compiler keeps what it compiled with the code object.
            code = value.__code__.replace()
            copy = types.FunctionType(code, space, value.__name__, value.__defaults__, closure)
            copy.__dict__.update(vars(value))
            for name in ("__kwdefaults__", "__qualname__", "__module__", "__doc__"):
                setattr(copy, name, getattr(value, name))
            self._copies[value] = copy
        return self._copies[value]

    def _space(self, function: types.FunctionType) -> dict[str, Any]:
        """The globals of a function's module, with attention replaced."""
        held = self._spaces.get(id(function.__globals__))
        if held is None:
            held = self._spaces[id(function.__globals__)] = dict(function.__globals__)
            # Without it the compiler reads globals from here; with it from the imported module.
            held.pop("__name__", None)
            held.update({name: self.copy(value) for name, value in held.items() if self.leads(value)})
        names, attributes = _read(function.__code__)
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType) and self._is_way(value, attributes):
                held[name] = self._module(value)
            elif _TABLE in attributes and _is_table(value):
                held[name] = _Table(value, self)
        return held

    def _module(self, module: types.ModuleType) -> types.ModuleType:
        """A stand-in for a module through which attention functions are read."""
        if module not in self._modules:
            copy = self._modules[module] = types.ModuleType(module.__name__)
            copy.__dict__.update(vars(module))
            for name in (_SDPA, _DISPATCH):
                if _replacement(vars(module).get(name)) is not None:
                    copy.__dict__[name] = _replacement(vars(module)[name])
            for name, inner in (("nn", nn), ("functional", F)):
                if vars(module).get(name) is inner:
                    copy.__dict__[name] = self._module(inner)
        return self._modules[module]

    # -------------------------------------------------------------------------------------- classes and instances

    def methods(self, cls: type) -> dict[str, Any]:
        """The methods of a class, inherited ones too, that lead to attention."""
        names = {name for base in cls.__mro__ if base not in (object, nn.Module) for name in vars(base)}
        found = {name: _static(cls, name) for name in sorted(names)}
        return {name: value for name, value in found.items() if self.leads(getattr(value, "__func__", value))}

    def method(self, cls: type, name: str) -> Any:
        """A method of a class with attention replaced, static or class methods as such."""
        value = _static(cls, name)
        inner = getattr(value, "__func__", None)
        return self.copy(value) if inner is None else type(value)(self.copy(inner))

    def attributes(self, instance: Any) -> dict[str, Any]:
        """Attributes of an instance that hold attention functions, replaced."""
        return {name: self.copy(value) for name, value in vars(instance).items() if self.leads(value)}

    def entry(self, cls: type, name: str) -> Callable[..., Any]:
        """The method by which an attention module, or its processor, is called: it says whose attention comes."""
        if (cls, name) not in self._entries:
            inner = self.copy(_static(cls, name))

            @functools.wraps(inner)
            def entered(self: Any, *args: Any, **kwargs: Any) -> Any:
                outer, bridged = _CURRENT.bridged, self.__dict__[SITE]
                _CURRENT.bridged, bridged.part = bridged, 0
                try:
                    return inner(self, *args, **kwargs)
                finally:
                    _CURRENT.bridged = outer

            self._entries[cls, name] = entered
        return self._entries[cls, name]

    def processor_class(self, cls: type) -> type:
        """A subclass of a processor's class with attention replaced."""
        if cls not in self._classes:
            body = {name: self.method(cls, name) for name in self.methods(cls)}
            body |= {"__call__": self.entry(cls, "__call__"), "__module__": cls.__module__, "__doc__": cls.__doc__}
            self._classes[cls] = type(cls)(f"Bridged{cls.__name__}", (cls,), body)
        return self._classes[cls]


def _cells(function: types.FunctionType) -> list[tuple[types.CellType, Any]]:
    """The cells of a closure and what they hold; None for an empty one."""
    cells = function.__closure__ or ()
    return [(cell, cell.cell_contents if cell != types.CellType() else None) for cell in cells]


def _static(cls: type, name: str) -> Any:
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base))


@functools.cache
def _read(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of globals, and of attributes, that a function reads, with the functions inside it."""
    names: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more_names, more_attributes = _read(inner)
            names, attributes = names | more_names, attributes | more_attributes
    return names, attributes
