"""The main stack of blocks of a transformer, in the order in which its forward runs them.

Read from the source of the model's `forward`: its loops over lists of blocks, in the order of the source. A segment is
a run of blocks that a cache can skip as one: what its first block takes and what its last block returns have the same
streams. Whatever the model does between two blocks of a segment (adding a control residual, swapping text features)
is part of the segment.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._adapter import class_key
from ._streams import UNKNOWN, argument_of, evaluate, function_of, statements, streams_of


@dataclass(frozen=True)
class Stack:
    """The blocks of a model that a cache may skip, in the order of execution.

    To skip a segment, every block of it hands its streams on (`Streams.give(Streams.take(...))`) and the last one
    returns what its streams are to be. The update of a segment is the difference between what its last block returns
    and what its *first* takes: in between a model may add to the streams, or run a block on another view of them. It
    may also write into the tensor that a block returned (the control residuals of Chroma and Bria), so what a skipped
    block hands on must not be a tensor that is still needed.

    A call may leave blocks out (skip-layer guidance). Where it leaves out the first or the last of a segment, the
    segment has no update to remember.

    Attributes:
        segments: Runs of blocks. Lists that follow each other directly with the same streams are one segment.
        names: The name of each block within the model, in the same form.
    """

    segments: tuple[tuple[nn.Module, ...], ...]
    names: tuple[tuple[str, ...], ...]


# Lists of blocks with one of these words in their name prepare a stream, or guide the main stack from beside it.
_APART = ("refiner", "text", "txt", "caption", "mode_blocks", "vace", "control", "adapter")

_REFUSED = {
    "diffusers.models.transformers.transformer_anyflow_far:AnyFlowFARTransformer3DModel": (
        "some of its calls only fill the key-value cache of the next chunk of frames"
    ),
    "diffusers.models.transformers.transformer_wan_animate_2:WanAnimate2Transformer3DModel": (
        "its reference pass only fills a key-value cache, and unconditional calls leave out a block"
    ),
}


@dataclass
class _Loop:
    """One loop over blocks in a model's forward."""

    rows: list[list[nn.Module]]  # the blocks of each iteration, in the order of their calls
    before: tuple[str, ...] | None  # variables that the streams are read from, and those that they go to
    after: tuple[str, ...] | None
    always: list[bool]  # for each block of an iteration, whether every iteration calls it
    reshaped: bool  # whether the loop changes the streams between two blocks of an iteration
    body: list[ast.stmt] = field(default_factory=list)  # statements among which it is
    node: ast.stmt | None = None
    sure: bool = True  # whether every call of the model runs it
    nested: bool = False  # whether it is itself in a loop


def stack_of(model: nn.Module) -> Stack:
    """The main stack of blocks of a transformer.

    The class's own `forward` is read, so it does not matter whether this instance is patched.

    Raises:
        LookupError: The model has no stack that can be skipped, or its source does not say so; with the reason.
    """
    name = type(model).__name__
    if class_key(model) in _REFUSED:
        raise LookupError(f"{name}: {_REFUSED[class_key(model)]}")
    names = {id(module): path for path, module in model.named_modules()}
    loops = [
        loop
        for loop in _loops(model, function_of(type(model), "forward").body, {"self": model}, ())
        if loop.rows and not any(word in _list_name(loop, names) for word in _APART)
    ]
    reasons = [_refusal(loop) for loop in loops]
    loops = [loop for loop, reason in zip(loops, reasons, strict=True) if reason is None]
    if not loops:
        raise LookupError(next(iter(reasons), None) or f"{name}.forward has no loop over a list of blocks")
    blocks = [block for loop in loops for row in loop.rows for block in row]
    if len(set(map(id, blocks))) < len(blocks) or any(loop.nested for loop in loops):
        raise LookupError(f"{name} runs its blocks more than once in a call")

    segments: list[list[nn.Module]] = []
    last: _Loop | None = None
    for loop in loops:
        parts = _segments(loop)
        if last is not None and _follows(last, loop):
            segments[-1] += parts.pop(0)
        segments += parts
        last = loop
    return Stack(tuple(map(tuple, segments)), tuple(tuple(names[id(b)] for b in segment) for segment in segments))


def _list_name(loop: _Loop, names: dict[int, str]) -> str:
    return names.get(id(loop.rows[0][0]), "").rpartition(".")[0]


def _refusal(loop: _Loop) -> str | None:
    """Why the blocks of a loop cannot be skipped, or None."""
    for row in loop.rows:
        for block in row:
            try:
                if not streams_of(block).skippable:
                    return f"{type(block).__name__} also returns something that is no stream"
            except LookupError as error:
                return str(error)
    return None


def _segments(loop: _Loop) -> list[list[nn.Module]]:
    """The segments of one loop: one, unless its last blocks run on another view of the streams."""
    blocks = [block for row in loop.rows for block in row]
    apart = len(loop.always) - 1 if loop.reshaped or not all(loop.always[1:]) else 0
    whole = len(blocks) - apart
    return [blocks[:whole], *([block] for block in blocks[whole:])]


def _follows(first: _Loop, second: _Loop) -> bool:
    """Whether a loop goes on with the streams that another one left."""
    if first.before is None or not first.before == first.after == second.before == second.after:
        return False
    simple = all(loop.sure and loop.always == [True] for loop in (first, second))
    if not simple or first.body is not second.body:
        return False
    start, end = (next(i for i, node in enumerate(first.body) if node is loop.node) for loop in (first, second))
    between = first.body[start + 1 : end]
    return not _stores(between, first.before)


def _stores(body: Sequence[ast.stmt], names: Sequence[str]) -> bool:
    """Whether statements assign to one of these variables, or to a part of one."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name | ast.Subscript) and isinstance(node.ctx, ast.Store):
                inner: ast.expr = node
                while isinstance(inner, ast.Subscript):
                    inner = inner.value
                if isinstance(inner, ast.Name) and inner.id in names:
                    return True
    return False


def _loops(model: nn.Module, body: list[ast.stmt], names: dict[str, Any], inside: tuple[str, ...]) -> list[_Loop]:
    """The loops over modules among some statements, in order."""
    found: list[_Loop] = []
    for node in body:
        if isinstance(node, ast.For):
            rows = _modules(evaluate(node.iter, names))
            if rows:
                found.append(_loop(node, rows, body))
            else:
                inner = _loops(model, node.body, names, inside)
                for loop in inner:
                    loop.nested = True
                found += inner
        elif isinstance(node, ast.If):
            found += _branches(model, node, names, inside)
        elif isinstance(node, ast.With | ast.Try):
            found += _loops(model, node.body, names, inside)
        else:
            _remember(node, names)
            for method in _own_methods(node):
                if method not in inside and hasattr(type(model), method):
                    found += _called(model, method, inside)
    return found


def _called(model: nn.Module, method: str, inside: tuple[str, ...]) -> list[_Loop]:
    try:
        function = function_of(type(model), method)
    except LookupError:
        return []
    return _loops(model, function.body, {"self": model}, (*inside, method))


def _branches(model: nn.Module, node: ast.If, names: dict[str, Any], inside: tuple[str, ...]) -> list[_Loop]:
    test = evaluate(node.test, names)
    if test is not UNKNOWN:
        return _loops(model, node.body if test else node.orelse, names, inside)
    one, other = (_loops(model, branch, dict(names), inside) for branch in (node.body, node.orelse))
    if one and other:
        if [loop.rows for loop in one] != [loop.rows for loop in other]:
            raise LookupError(f"{type(model).__name__} runs its blocks in different orders")
        return other
    for loop in (*one, *other):
        loop.sure = False
    return one + other


def _remember(node: ast.stmt, names: dict[str, Any]) -> None:
    """Note a local name for a list of modules, and forget one that is used for something else."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        name, value = node.targets[0].id, evaluate(node.value, names)
        names.pop(name, None)
        if isinstance(value, nn.Module):
            names[name] = value


def _own_methods(node: ast.stmt) -> Iterator[str]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            owner = call.func.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                yield call.func.attr


def _modules(items: Any) -> list[list[nn.Module]]:
    """The modules that each iteration of a loop gets."""
    if items is UNKNOWN or isinstance(items, nn.ModuleDict | str | dict) or not hasattr(items, "__iter__"):
        return []
    rows = [_flat(item) for item in items]
    return rows if all(rows) else []


def _flat(item: Any) -> list[nn.Module]:
    if isinstance(item, nn.Module):
        return [item]
    return [module for part in item for module in _flat(part)] if isinstance(item, tuple) else []


# ------------------------------------------------------------------------------------------------- one loop


def _loop(node: ast.For, rows: list[list[nn.Module]], body: list[ast.stmt]) -> _Loop:
    targets = _target_names(node.target)[-len(rows[0]) :]
    calls = {name: _direct_call(node.body, name) for name in targets}
    order = sorted(range(len(targets)), key=lambda i: _position(calls[targets[i]]))
    variables: set[tuple[tuple[str, ...] | None, tuple[str, ...] | None]] = {
        _variables(node.body, calls[name], rows[0][i]) for i, name in enumerate(targets)
    }
    before, after = variables.pop() if len(variables) == 1 else (None, None)
    return _Loop(
        rows=[[row[i] for i in order] for row in rows],
        before=before,
        after=after,
        always=[_always(node.body, targets[i]) for i in order],
        reshaped=len(targets) > 1 and _changed_between(node.body, targets, after),
        body=body,
        node=node,
    )


def _target_names(target: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def _position(call: ast.Call | None) -> tuple[int, int]:
    return (0, 0) if call is None else (call.lineno, call.col_offset)


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))


def _calls(node: ast.AST, name: str) -> bool:
    """Whether something calls a block, itself or through a function for checkpointing."""
    return any(
        isinstance(call, ast.Call) and (_mentions(call.func, name) or any(_mentions(a, name) for a in call.args[:1]))
        for call in ast.walk(node)
    )


def _direct_call(body: Sequence[ast.stmt], name: str) -> ast.Call | None:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                return node
    return None


def _always(body: Sequence[ast.stmt], name: str) -> bool:
    """Whether every pass through these statements calls a block."""
    for node in body:
        if isinstance(node, ast.If):
            if _always(node.body, name) and _always(node.orelse, name):
                return True
            if any(isinstance(part, ast.Continue | ast.Break) for part in ast.walk(node)):
                return False
        elif not isinstance(node, ast.For | ast.While) and _calls(node, name):
            return True
    return False


def _variables(
    body: Sequence[ast.stmt], call: ast.Call | None, block: nn.Module
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The variables that a call of a block reads its streams from, and those that it assigns them to."""
    if call is None:
        return None, None
    try:
        streams = streams_of(block)
    except LookupError:
        return None, None
    given = [argument_of(_unpacked(body, call), name, i) for name, i in zip(streams.inputs, streams.positions)]
    before = _all_names(given)
    for statement in statements(body):
        if isinstance(statement, ast.Assign) and any(node is call for node in ast.walk(statement.value)):
            target = statement.targets[0]
            elements = target.elts if isinstance(target, ast.Tuple) else [target]
            if len(elements) == len(streams.outputs):
                found = dict(zip(streams.outputs, elements, strict=True))
                return before, _all_names([found.get(i) for i in range(len(streams.inputs))])
    return before, None


def _all_names(expressions: Sequence[ast.expr | None]) -> tuple[str, ...] | None:
    found = [expression.id for expression in expressions if isinstance(expression, ast.Name)]
    return tuple(found) if len(found) == len(expressions) else None


def _unpacked(body: Sequence[ast.stmt], call: ast.Call) -> ast.Call:
    """A call `block(*args)` with the tuple that the same loop assigns to `args` put in."""
    if len(call.args) == 1 and isinstance(call.args[0], ast.Starred) and isinstance(call.args[0].value, ast.Name):
        name = call.args[0].value.id
        for node in statements(body):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Tuple)
                and _all_names(node.targets) == (name,)
            ):
                return ast.Call(call.func, node.value.elts, call.keywords)
    return call


def _changed_between(body: Sequence[ast.stmt], blocks: Sequence[str], streams: Sequence[str] | None) -> bool:
    """Whether a loop assigns its streams from anything but its blocks."""
    return streams is None or any(
        _stores([node], streams) and not any(_calls(node, name) for name in blocks)
        for node in statements(body)
        if not isinstance(node, ast.If | ast.For | ast.With)
    )
