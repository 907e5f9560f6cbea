"""The block of the original DiT (Peebles and Xie 2023) and SiT (Ma et al. 2024) code, recognised by structure.

That code is not a package: projects carry copies of it under module names of their own, so there is no class to name.
A block is one by its children, and is replaced if its forward is a known form of

    x + gate_msa * attn(modulate(norm1(x), shift_msa, scale_msa)), then the same for mlp

and what it calls `modulate` gives `x * (1 + scale) + shift`. It rounds narrowly.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import norm_modulate
from ._adapter import Adapter
from ._parts import add_gated, add_gated_then_norm, add_some, norm_options, part_of, recall


def form_of(function: Callable[..., Any]) -> str:
    """Twelve hex digits of what a function does, whatever its layout, comments, annotations and local names."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return "none"
    if not isinstance(tree, ast.FunctionDef):
        return "none"
    body = tree.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    given = tree.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
    names += [n.id for part in body for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    order = {name: f"v{i}" for i, name in enumerate(dict.fromkeys(names))}
    for node in (n for part in body for n in ast.walk(part)):
        if isinstance(node, ast.Name):
            node.id = order.get(node.id, node.id)
    arguments = (len(given.posonlyargs) + len(given.args), len(given.kwonlyargs), bool(given.vararg or given.kwarg))
    text = "\n".join([repr(arguments), *map(_text, body)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _text(node: Any) -> str:
    """A syntax tree as text that every Python version writes alike (`ast.dump` and `ast.unparse` changed)."""
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    unread = ("ctx", "kind", "type_comment", "annotation")
    fields = [f"{k}={_text(v)}" for k, v in ast.iter_fields(node) if k not in unread and v is not None and v != []]
    return f"{type(node).__name__}({','.join(fields)})"


@dataclass(frozen=True)
class StructuralAdapter(Adapter):
    """An adapter of modules that have certain children; `fingerprints` are forms of their forward.

    Attributes:
        norms: Names of the LayerNorms without affine parameters.
        chunks: Vectors that the modulation is split into.
        others: Names of the other children.
    """

    norms: tuple[str, ...] = ()
    chunks: int = 0
    others: tuple[str, ...] = ()

    def matches(self, module: Any) -> bool:
        """Whether the module is built like one of these."""
        children = getattr(module, "_modules", {})
        modulation = children.get("adaLN_modulation")
        if not isinstance(modulation, nn.Sequential) or len(modulation) != 2 or not isinstance(modulation[0], nn.SiLU):
            return False
        if any(children.get(name) is None for name in (*self.norms, *self.others)):
            return False
        # Not its weight: it may be quantised, or carry an adapter.
        width = getattr(modulation[1], "in_features", None)
        return width is not None and getattr(modulation[1], "out_features", None) == self.chunks * width

    def refusal(self, instance: Any) -> str | None:
        """Why the replacement cannot be used on this instance; None if it can."""
        for name in self.norms:
            norm = getattr(instance, name)
            if type(norm) is not nn.LayerNorm or norm.elementwise_affine or len(norm.normalized_shape) != 1:
                return f"{name} is {norm!r}, not a LayerNorm over the last dim without affine parameters"
        form = form_of(type(instance).forward)
        if form not in self.fingerprints:
            return f"unknown form of {type(instance).__name__}.forward ({form})"
        modulate = getattr(inspect.unwrap(type(instance).forward), "__globals__", {}).get("modulate")
        if modulate is None or not _modulates(modulate):
            return "what it calls modulate is not x * (1 + scale) + shift"
        return None


@functools.cache
def _modulates(function: Callable[..., Any]) -> bool:
    """Whether the function gives `x * (1 + scale) + shift` for one row of modulation per sample."""
    x = torch.arange(12, dtype=torch.float32).view(2, 3, 2) - 5
    shift, scale = torch.tensor([[1.0, -2.0], [4.0, 8.0]]), torch.tensor([[0.5, 2.0], [-3.0, 0.25]])
    try:
        with torch.no_grad():
            found = function(x, shift, scale)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    return isinstance(found, Tensor) and torch.equal(found, x * (1 + scale[:, None]) + shift[:, None])


def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
    """The block with fused adaLN sites."""
    if x.ndim != 3 or c.ndim != 2:
        return type(self).forward(self, x, c)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)

    attn = recall(self.attn, x, late=True)
    if attn is None:
        attn = self.attn(norm_modulate(x, scale_msa, shift_msa, law="narrow", **norm_options(self.norm1)))

    mlp = recall(self.mlp, x, late=True)
    part = part_of(self.mlp, x) if mlp is None else None
    options = norm_options(self.norm2)
    if part is not None:
        x = add_gated(x, attn, gate_msa, law="narrow")
        return add_some(part, x, self.mlp, gate_mlp, scale_mlp, shift_mlp, law="narrow", **options)
    if mlp is None:
        x, y = add_gated_then_norm(x, attn, gate_msa, scale_mlp, shift_mlp, law="narrow", **options)
        mlp = self.mlp(y)
    else:
        x = add_gated(x, attn, gate_msa, law="narrow")
    return add_gated(x, mlp, gate_mlp, law="narrow")


def final_forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
    """The last layer, its norm and modulation fused."""
    if x.ndim != 3 or c.ndim != 2:
        return type(self).forward(self, x, c)
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    return self.linear(norm_modulate(x, scale, shift, law="narrow", **norm_options(self.norm_final)))


STRUCTURAL_BLOCKS = (
    StructuralAdapter(
        cls="original DiT block",
        forward=forward,
        fingerprints=frozenset({"91ab682022c5", "b4d5829d9ecd"}),  # chunk(6, dim=1), chunk(6, dim=-1)
        sites=("attn", "mlp"),
        norms=("norm1", "norm2"),
        chunks=6,
        others=("attn", "mlp"),
    ),
)
STRUCTURAL_NORMS = (
    StructuralAdapter(
        cls="original DiT final layer",
        forward=final_forward,
        fingerprints=frozenset({"f3b285a40671", "ec5587664b90"}),  # chunk(2, dim=1), chunk(2, dim=-1)
        norms=("norm_final",),
        chunks=2,
        others=("linear",),
    ),
)
