"""What the GPU benchmark measures: ops at shapes of real models, with plain-torch form and least traffic of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskaccel.bench import registry
from maskaccel.ops._registry import SPECS
from maskaccel.ops.attention import reference as attention
from maskaccel.ops.attention import schema as attention_schema
from maskaccel.ops.tokens import reference as tokens

EPS = 1e-6
NEED_X, NEED_A, NEED_GATE, NEED_SCALE, NEED_SHIFT = 1, 2, 4, 8, 16
RMS = 1


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: Raw op.
        model: Where the shape comes from.
        shape: `(B, N, D)`, or `(B, S, H, Dh)` for qk_norm_rope.
        elements: Elements that are read or written at least once; their bytes are the least traffic.
        operands: `(device, dtype) -> arguments of the raw op`.
        eager: Plain torch on the arguments of the raw op (forward ops).
        graph: For a backward op: `arguments -> (outputs, inputs, gradients)` for `torch.autograd.grad`; its
            second argument is the function to run, which may be compiled.
        call: `(backend, arguments) -> call without arguments` where the raw op is not called itself.
        goal: Share of copy bandwidth to reach, or None.
    """

    op: str
    model: str
    shape: tuple[int, ...]
    elements: int
    operands: Callable[..., tuple]
    eager: Callable[..., Any]
    graph: Callable[..., tuple] | None = None
    call: Callable[[str, tuple], Callable[[], Any]] | None = None
    goal: float | None = None

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{self.op} {'x'.join(map(str, self.shape))} ({self.model})"

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic of one call."""
        return self.elements * dtype.itemsize


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _gated(x: Tensor, a: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r = x + gate[:, None] * a
    return r, _norm(r, scale, shift)


def _norm_pair(x: Tensor, *mods: Tensor) -> tuple[Tensor, Tensor]:
    return _norm(x, *mods[:2]), _norm(x, *mods[2:])


def _gated_pair(x: Tensor, a: Tensor, gate: Tensor, *mods: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r = x + gate[:, None] * a
    return r, *_norm_pair(r, *mods)


def _qk(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(t: Tensor, weight: Tensor) -> Tensor:
        n = F.rms_norm(t, t.shape[-1:], weight, EPS)
        a, b = n.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], -1).flatten(-2)
        return (n.float() * cos[:, None] + turned * sin[:, None]).to(t.dtype)

    return one(q, q_weight), one(k, k_weight)


def _chunks(shape: tuple[int, ...], count: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Modulation as models make it: chunks of one projection."""
    return torch.randn(shape[0], count * shape[2], device=device, dtype=dtype).mul_(0.3).chunk(count, 1)


def adaln_cases(model: str, shape: tuple[int, int, int]) -> list[Case]:
    """norm_modulate and gate_residual_norm_modulate, forward and backward."""

    def x(device: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def norm(device: str, dtype: torch.dtype) -> tuple:
        scale, shift = _chunks(shape, 2, device, dtype)
        return (x(device, dtype), scale, shift, None, None, None, None, None, EPS, 1.0, 0)

    def gated(device: str, dtype: torch.dtype) -> tuple:
        gate, scale, shift = _chunks(shape, 3, device, dtype)
        none = (None,) * 5
        return (x(device, dtype), x(device, dtype), gate, None, None, scale, shift, *none, EPS, EPS, 1.0, 0)

    def norm_backward(device: str, dtype: torch.dtype) -> tuple:
        x_, scale, shift, *rest = norm(device, dtype)
        return (x(device, dtype), None, x_, scale, shift, None, None, *rest, NEED_X | NEED_SCALE | NEED_SHIFT)

    def gated_backward(device: str, dtype: torch.dtype) -> tuple:
        r, a, gate, _, _, scale, shift, *rest = gated(device, dtype)
        needs = NEED_X | NEED_A | NEED_GATE | NEED_SCALE | NEED_SHIFT
        grads = x(device, dtype), x(device, dtype)
        return (*grads, None, r, a, gate, None, None, scale, shift, None, None, *rest, needs)

    def norm_graph(args: tuple, run: Callable[..., Any]) -> tuple:
        leaves = [t.detach().requires_grad_() for t in (args[2], args[3], args[4])]
        return [run(*leaves)], leaves, [args[0]]

    def gated_graph(args: tuple, run: Callable[..., Any]) -> tuple:
        r, a, gate, scale, shift = args[3], args[4], args[5], args[8], args[9]
        # of the x that leads to this r, up to rounding
        leaves = [t.detach().requires_grad_() for t in (r - gate[:, None] * a, a, gate, scale, shift)]
        return list(run(*leaves)), leaves, [args[0], args[1]]

    one = math.prod(shape)
    return [
        Case("norm_modulate", model, shape, 2 * one, norm, lambda a: (_norm, a[:3])),
        Case("gate_residual_norm_modulate", model, shape, 4 * one, gated,
             lambda a: (_gated, (a[0], a[1], a[2], a[5], a[6]))),
        Case("norm_modulate_backward", model, shape, 3 * one, norm_backward, lambda a: (_norm, ()), norm_graph),
        Case("gate_residual_norm_modulate_backward", model, shape, 6 * one, gated_backward,
             lambda a: (_gated, ()), gated_graph),
    ]  # fmt: skip


def pair_cases(model: str, shape: tuple[int, int, int]) -> list[Case]:
    """One norm with two modulations, as blocks with two attentions have it."""
    none = (None,) * 5

    def norm(device: str, dtype: torch.dtype) -> tuple:
        x = torch.randn(shape, device=device, dtype=dtype)
        return (x, *_chunks(shape, 4, device, dtype), *none, EPS, 1.0, 0)

    def gated(device: str, dtype: torch.dtype) -> tuple:
        x, a = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        gate, *mods = _chunks(shape, 5, device, dtype)
        return (x, a, gate, None, None, *mods, *none, EPS, EPS, 1.0, 0)

    one = math.prod(shape)
    return [
        Case("norm_modulate_pair", model, shape, 3 * one, norm, lambda a: (_norm_pair, a[:5])),
        Case("gate_residual_norm_modulate_pair", model, shape, 5 * one, gated,
             lambda a: (_gated_pair, (*a[:3], *a[5:9]))),
    ]  # fmt: skip


def qk_case(model: str, shape: tuple[int, int, int, int]) -> Case:
    """QK RMS norm per head and interleaved RoPE."""

    def operands(device: str, dtype: torch.dtype) -> tuple:
        _, tokens, _, dim = shape
        q, k = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        weights = [torch.rand(dim, device=device, dtype=dtype) + 0.5 for _ in range(2)]
        angle = torch.rand(tokens, dim // 2, device=device).mul_(6.28).repeat_interleave(2, 1)
        return (q, k, *weights, None, None, angle.cos(), angle.sin(), None, EPS, RMS)

    return Case("qk_norm_rope", model, shape, 4 * math.prod(shape), operands, lambda a: (_qk, (*a[:4], a[6], a[7])))


def lists_case(model: str, shape: tuple[int, int, int, int]) -> Case:
    """Index lists of a mask `(samples, heads, rows, columns)` of tiles, half of them kept."""
    *lead, columns = shape

    def operands(device: str, dtype: torch.dtype) -> tuple:
        words = (columns + 31) // 32
        bits = torch.randint(-(2**31), 2**31, (*lead, words), device=device).to(torch.int32)
        return bits, None, columns, False

    # int32 bits in, int32 lists out; counted in elements of two bytes
    return Case("tile_lists", model, shape, 2 * math.prod(shape), operands, lambda a: (attention.tile_lists, a))


def selection_cases(model: str, shape: tuple[int, int, int, int], block: int = 128) -> list[Case]:
    """Means of blocks of `(B, S, H, D)` with their likeness, and the choice of half of the mass of their scores."""
    batch, sequence, heads, _ = shape
    blocks = -(-sequence // block)

    def means(device: str, dtype: torch.dtype) -> tuple:
        return torch.randn(shape, device=device, dtype=dtype), block, True

    def select(device: str, dtype: torch.dtype) -> tuple:
        scores = torch.randn(batch, heads, blocks, blocks, device=device).mul_(3).softmax(-1)
        return scores, None, None, None, attention_schema.MASS, 0.5, 1

    pairs = 2 * batch * heads * blocks * blocks  # fp32, counted in elements of two bytes
    return [
        Case("tile_means", model, shape, math.prod(shape), means, lambda a: (attention.tile_means, a)),
        Case("select_tiles", model, (batch, heads, blocks, blocks), pairs, select,
             lambda a: (attention.select_tiles, a)),
    ]  # fmt: skip


def token_cases(shapes: list[tuple[str, tuple[int, int, int]]]) -> list[Case]:
    """The token ops that choose: random ids, matching, which masked positions are revealed."""

    def keep(model: str, shape: tuple[int, int, int]) -> Case:
        batch, n, _ = shape

        def operands(device: str, dtype: torch.dtype) -> tuple:
            step = torch.zeros(1, dtype=torch.int64, device=device)
            return (step, None, None, None, None, 0, 0, 0, batch, n, n // 2, 1, 0, 0)

        # ids and their inverse, int32, counted in elements of two bytes
        return Case("random_keep", model, shape, 3 * batch * n, operands, lambda a: (tokens.random_keep, a))

    def match(model: str, shape: tuple[int, int, int]) -> Case:
        def operands(device: str, dtype: torch.dtype) -> tuple:
            ids = torch.arange(shape[1], dtype=torch.int32, device=device).view(1, -1)
            metric = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            return metric, ids[:, shape[1] // 4 :].contiguous(), ids[:, : shape[1] // 4].contiguous()

        return Case("match_tokens", model, shape, math.prod(shape), operands, lambda a: (tokens.match_tokens, a))

    def unmask(model: str, shape: tuple[int, int, int]) -> Case:
        batch, n, _ = shape

        def operands(device: str, dtype: torch.dtype) -> tuple:
            confidence = torch.rand(batch, n, generator=torch.Generator().manual_seed(0)).to(device)
            given = torch.full((batch, n), 9, device=device)
            step = torch.zeros(1, dtype=torch.int64, device=device)
            count = torch.full((1, 1), n // 16, dtype=torch.int32, device=device)
            return (confidence, given - 1, given, step, count, None, None, None, 9, 0, 0, math.inf, 0.0)

        return Case("unmask_select", model, shape, 14 * batch * n, operands, lambda a: (tokens.unmask_select, a))

    return [make(model, shape) for model, shape in shapes for make in (keep, match, unmask)]


def target_cases(models: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Case]:
    """The ops with goals at `(B, N, D)` and `(B, S, H, Dh)` of each model, forward and backward."""
    norms, rest = [], []
    for model, (stream, heads) in models.items():
        both = [*adaln_cases(model, stream), qk_case(model, heads), _backward_case(QK, model, heads)]
        norms += [replace(case, goal=0.85 if case.graph else 0.92) for case in both]
        for op in (registry.OPS[name] for name in MOVERS):
            shape = heads if "heads" in op.dims else (3, *stream) if "steps" in op.dims else stream
            cases = [_forward_case(op, model, shape), *([_backward_case(op, model, shape)] if op.wants_grad else [])]
            rest += [replace(case, goal=0.90) for case in cases]
    return [*(case for case in norms if not case.graph), *(case for case in norms if case.graph), *rest]


def registry_cases(tiny: bool, known: set[str]) -> list[Case]:
    """Forward and backward of what the registry of benchmarks has beyond the ops of `known`, by the public call."""
    cases = []
    for op in registry.OPS.values():
        model, shape = next(
            ((m, s) for m, s in op.shapes.items() if m.startswith("FLUX")), next(iter(op.shapes.items()))
        )
        if tiny:
            model, shape = "tiny", (1, 8, 2, 16) if "heads" in op.dims else (*(2,) * (len(shape) - 3), 2, 8, 64)
        name = model if op.name == op.raw else f"{model}, {op.name.removeprefix(op.function + '.')}"
        if op.name not in known:
            cases.append(_forward_case(op, name, shape))
            if op.wants_grad:
                cases.append(_backward_case(op, name, shape))
    return cases


def _operands(op: registry.Op, shape: tuple[int, ...]) -> Callable[[str, torch.dtype], tuple]:
    """Inputs drawn on the device: drawing a gigabyte on the host takes longer than all of its measurement."""

    def make(device: str, dtype: torch.dtype) -> tuple:
        op.check_shape(shape)
        with torch.device(device):
            return (op.make(shape, dtype, torch.device(device), torch.Generator(device).manual_seed(0)),)

    return make


def _forward_case(op: registry.Op, name: str, shape: tuple[int, ...]) -> Case:
    return Case(
        op.raw, name, shape, op.elements(shape), _operands(op, shape), lambda args: (op.eager, args),
        call=lambda backend, args: partial(op.run, args[0], backend),
    )  # fmt: skip


def _backward_case(op: registry.Op, name: str, shape: tuple[int, ...]) -> Case:
    def graph(args: tuple, run: Callable[..., Any]) -> tuple:
        inputs = op.with_grad(args[0])
        outputs = run(inputs)
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in outputs]
        return outputs, [inputs[name] for name in op.wants_grad], grads

    def call(backend: str, args: tuple) -> Callable[[], Any]:
        return partial(torch.autograd.grad, *graph(args, lambda inputs: op.run(inputs, backend)), retain_graph=True)

    # The derivative of some ops is another op, or themselves.
    raw, label = (f"{op.raw}_backward", name) if f"{op.raw}_backward" in SPECS else (op.raw, f"{name}, backward")
    return Case(
        raw, label, shape, op.elements_backward(shape), _operands(op, shape),
        lambda args: (op.eager, args), graph, call,
    )  # fmt: skip


# Ops that move rows or histories and compute little
MOVERS = (
    "combine_history", "scatter_combine", "relative_difference", "gather_modulate", "scatter_merge", "write_kv_rows",
)  # fmt: skip
QK = registry.OPS["qk_norm_rope"]
MODELS = ("FLUX.1 1024px", "Wan2.1-1.3B 480p 81f", "Wan2.1-14B 480p 81f", "SD3.5-large 1024px", "SD3.5-medium 1024px")
TINY = (2, 8, 64), (1, 8, 2, 16)
BATCHED = (8, 4096, 3072), (8, 4096, 24, 128)


@functools.cache
def all_cases(tiny: bool) -> dict[str, Case]:
    """Every case by name, those with goals first; `tiny` shapes walk the same code without a GPU."""
    cases = target_cases({"tiny": TINY} if tiny else {m: (registry.TOKENS[m], registry.HEADS[m]) for m in MODELS})
    known = {"norm_modulate", "gate_residual_norm_modulate", QK.name, *MOVERS}
    if tiny:
        cases += [*pair_cases("tiny", (2, 8, 64)), lists_case("tiny", (1, 2, 5, 37))]
        cases += selection_cases("tiny", (1, 40, 2, 16), 16)
        cases += token_cases([("tiny", (2, 16, 64))])
    else:
        cases += [*adaln_cases("batch of 8", BATCHED[0]), qk_case("batch of 8", BATCHED[1])]
        cases += pair_cases("SD3.5-medium 1024px", (2, 4096, 1536))
        cases += [lists_case("Wan 14B 720p", (1, 40, 591, 591)), lists_case("FLUX", (1, 24, 36, 36))]
        cases += selection_cases("Wan 14B 480p", (1, 32760, 40, 128))
        cases += token_cases([("FLUX", (1, 4096, 3072)), ("SiT-XL/2", (256, 256, 1152))])
    cases += registry_cases(tiny, known)
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named
