"""The tensors that run through a stack of transformer blocks, and where a block takes and returns them.

A stream is a tensor that a block takes and returns updated: the hidden states, and the text states where the block
returns them (joint attention does, cross-attention does not). A block whose streams are known can be skipped: it hands
its inputs on in the order in which it returns its outputs.

What a class of block returns is read from the source of its `forward`. Classes whose source does not say it are in
`_KNOWN`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import class_key


@dataclass(frozen=True)
class Streams:
    """Where the streams of a block are in its arguments and in what it returns.

    Values of streams are always a tuple in the order of `inputs`. A value is None where the block is called without
    that stream, or returns None in its place: the last block of SD3 keeps no text.

    Attributes:
        inputs: Names of the parameters of `forward`, the hidden states first.
        positions: Index of each among the positional arguments, `self` not counted.
        outputs: For each returned element the index into `inputs`, or None for an element that is no stream.
        is_tuple: Whether the block returns a tuple; else it returns the one element itself.
    """

    inputs: tuple[str, ...]
    positions: tuple[int, ...]
    outputs: tuple[int | None, ...]
    is_tuple: bool

    @property
    def skippable(self) -> bool:
        """Whether everything that the block returns is a stream, so that `give` can stand in for the block."""
        return None not in self.outputs

    def take(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """The streams in the arguments of one call."""
        named = zip(self.inputs, self.positions, strict=True)
        return tuple(args[i] if i < len(args) else kwargs.get(name) for name, i in named)

    def give(self, values: Sequence[Tensor | None]) -> Any:
        """What the block returns if its streams leave it with these values.

        Raises:
            LookupError: The block also returns something that is no stream.
            ValueError: Not one value for each stream.
        """
        if len(values) != len(self.inputs):
            raise ValueError(f"values has {len(values)} elements; the streams are {', '.join(self.inputs)}")
        if not self.skippable:
            raise LookupError(f"returned element {self.outputs.index(None)} is no stream of {', '.join(self.inputs)}")
        returned = tuple(values[i] for i in self.outputs if i is not None)
        return returned if self.is_tuple else returned[0]

    def read(self, output: Any) -> tuple[Tensor | None, ...]:
        """The streams in what the block returned.

        Raises:
            TypeError: It is not of the form that `outputs` and `is_tuple` say.
        """
        if isinstance(output, tuple) is not self.is_tuple or (self.is_tuple and len(output) != len(self.outputs)):
            wanted = f"a tuple of {len(self.outputs)}" if self.is_tuple else "one tensor"
            found = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
            raise TypeError(f"the block returned {found}, not {wanted}")
        values = dict(zip(self.outputs, output if self.is_tuple else (output,), strict=True))
        return tuple(values[i] for i in range(len(self.inputs)))


# Blocks whose source does not say which streams they return.
_KNOWN = {
    # returns both streams if asked to; the model joins them before and does not ask
    "diffusers.models.transformers.transformer_flux2:Flux2SingleTransformerBlock": ("hidden_states",),
    # the sum with the residual is in a function of its own
    "diffusers.models.transformers.transformer_kandinsky6_sr:Kandinsky6SRTransformerBlock": ("hidden_states",),
}

# What the names of text streams begin with; they come after the hidden states.
_TEXT = ("encoder", "context", "txt", "text", "und_")


def streams_of(block: nn.Module) -> Streams:
    """The streams of a transformer block.

    The class's own `forward` is read, so it does not matter whether this instance is patched.

    Raises:
        LookupError: The source does not say which of its inputs the block returns, or there is no source.
    """
    cls = type(block)
    names = parameters_of(cls)
    known = _KNOWN.get(class_key(block))
    if known is not None:
        return _streams(cls, names, known, is_tuple=False)
    returned, found = set(), None
    for tests, value in _returns(cls):
        if any(_holds(test, block) is not wanted for test, wanted in tests if _holds(test, block) is not None):
            continue
        inner = _inner(block, value)
        if inner is not None:
            found = _through(cls, names, value, streams_of(inner))
        else:
            is_tuple = isinstance(value, ast.Tuple)
            elements = value.elts if isinstance(value, ast.Tuple) else [value]
            found = _streams(cls, names, [_root(e, _roots(cls)) for e in elements], is_tuple)
        returned.add(found)
    if found is None:
        raise LookupError(f"{cls.__name__}.forward returns nothing")
    if len(returned) > 1:
        raise LookupError(f"{cls.__name__}.forward returns different streams in different cases")
    return found


def _streams(cls: type, names: Sequence[str], returned: Sequence[str | None], is_tuple: bool) -> Streams:
    streams = [name for name in returned if name is not None]
    if not streams:
        raise LookupError(f"the source of {cls.__name__}.forward does not say which of its inputs it returns")
    if len(set(streams)) < len(streams):
        raise LookupError(f"{cls.__name__}.forward returns {streams[0]} more than once")
    inputs = sorted(streams, key=lambda name: (name.startswith(_TEXT), names.index(name)))
    return Streams(
        inputs=tuple(inputs),
        positions=tuple(names.index(name) for name in inputs),
        outputs=tuple(None if name is None else inputs.index(name) for name in returned),
        is_tuple=is_tuple,
    )


def _through(cls: type, names: Sequence[str], call: ast.Call, inner: Streams) -> Streams:
    """The streams of a block that returns what a block inside it returns."""
    given = [argument_of(call, name, i) for name, i in zip(inner.inputs, inner.positions, strict=True)]
    outer = [_root(value, _roots(cls)) if value is not None else None for value in given]
    return _streams(cls, names, [None if i is None else outer[i] for i in inner.outputs], inner.is_tuple)


def _inner(block: nn.Module, value: ast.expr) -> nn.Module | None:
    """The child of which a block returns the output as it is."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("self."):
        child = evaluate(value.func, {"self": block})
        if isinstance(child, nn.Module):
            return child
    return None


def _holds(test: ast.expr, block: nn.Module) -> bool | None:
    """Whether a condition holds in this block; None if that depends on the call."""
    value = evaluate(test, {"self": block})
    return None if value is UNKNOWN else bool(value)


@functools.cache
def _roots(cls: type) -> dict[str, str]:
    """For each local name of a block's forward the parameter that it continues, where there is one."""
    roots = {name: name for name in parameters_of(cls)}
    for node in statements(function_of(cls, "forward").body):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and roots.get(name.id) != name.id:  # parameters stay what they are
                    root = _root(value, roots)
                    if root is None:
                        roots.pop(name.id, None)
                    else:
                        roots[name.id] = root
    return roots


def _root(value: ast.expr, roots: Mapping[str, str]) -> str | None:
    """The parameter that an expression is an update of: `x`, `x + y`, `(x + y) * mask`, `x.to(dtype)`, `x[:, :n]`."""
    if isinstance(value, ast.Name):
        return roots.get(value.id)
    if isinstance(value, ast.BinOp):
        left = _root(value.left, roots)
        return left if left is not None or not isinstance(value.op, ast.Add) else _root(value.right, roots)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return _root(value.func.value, roots)
    if isinstance(value, ast.Subscript):
        return _root(value.value, roots)
    return None


@functools.cache
def _returns(cls: type) -> list[tuple[list[tuple[ast.expr, bool]], ast.expr]]:
    """What a block's forward returns, with the conditions under which it gets there."""
    found: list[tuple[list[tuple[ast.expr, bool]], ast.expr]] = []

    def visit(body: Sequence[ast.stmt], tests: list[tuple[ast.expr, bool]]) -> None:
        tests = list(tests)
        for node in body:
            if isinstance(node, ast.Return) and node.value is not None:
                found.append((list(tests), node.value))
            elif isinstance(node, ast.If):
                visit(node.body, [*tests, (node.test, True)])
                visit(node.orelse, [*tests, (node.test, False)])
                if node.body and isinstance(node.body[-1], ast.Return):
                    tests.append((node.test, False))
            else:
                for inner in _bodies(node):
                    visit(inner, tests)

    visit(function_of(cls, "forward").body, [])
    return found


# ------------------------------------------------------------------------------------------------ reading sources


@functools.cache
def function_of(cls: type, method: str) -> ast.FunctionDef:
    """The syntax tree of a method, decorators looked through.

    Raises:
        LookupError: There is no Python source.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, method))))
        tree = ast.parse(source).body[0]
    except (AttributeError, OSError, TypeError, SyntaxError) as error:
        raise LookupError(f"{cls.__name__}.{method} has no source to read") from error
    if not isinstance(tree, ast.FunctionDef):
        raise LookupError(f"{cls.__name__}.{method} is not a plain function")
    return tree


def parameters_of(cls: type) -> list[str]:
    """The positional parameters of a class's forward, `self` left out."""
    arguments = function_of(cls, "forward").args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]


def argument_of(call: ast.Call, name: str, position: int) -> ast.expr | None:
    """What a call gives for a parameter; None where it gives nothing or unpacks its arguments."""
    named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    if named is not None or any(isinstance(value, ast.Starred) for value in call.args[: position + 1]):
        return named
    return call.args[position] if position < len(call.args) else None


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement of a function in the order of the source, those of functions inside it left out."""
    for node in body:
        yield node
        for inner in _bodies(node):
            yield from statements(inner)


def _bodies(node: ast.stmt) -> list[list[ast.stmt]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return []
    return [getattr(node, field) for field in ("body", "orelse", "finalbody") if getattr(node, field, None)]


UNKNOWN = object()
_BUILTINS = {"len": len, "enumerate": enumerate, "zip": zip, "range": range, "reversed": reversed, "list": list}


def evaluate(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of a model's source that needs nothing but `names`; else `UNKNOWN`."""
    for node in ast.walk(expression):
        if isinstance(node, ast.Name) and node.id not in names and node.id not in _BUILTINS:
            return UNKNOWN
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _BUILTINS):
            return UNKNOWN  # never run a model's own code
    try:
        code = compile(ast.Expression(expression), "<model source>", "eval")
        value = eval(code, {"__builtins__": _BUILTINS}, dict(names))
    except Exception:  # whatever is wrong with it, it is not known
        return UNKNOWN
    return UNKNOWN if isinstance(value, torch.Tensor) else value
