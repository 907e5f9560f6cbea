"""The ops that are measured: shapes of real models, inputs, our call, the eager baseline, and the bytes it must move.

Every op of `maskaccel.ops` has one entry here; the runner, `maskaccel bench`, `maskaccel doctor` and the pytest
suites all read this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import attention, eager, tokens
from .eager import Inputs

Shape = tuple[int, ...]
Outputs = tuple[Tensor, ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {**DTYPES, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (batch, tokens, width) of the residual stream: text and image rows together where a block holds both in one tensor
TOKENS: dict[str, Shape] = {
    "DiT-XL/2 512px": (2, 1024, 1152),
    "PixArt-alpha 1024px": (2, 4096, 1152),
    "SD3.5-medium 1024px": (2, 4096, 1536),
    "SD3.5-large 1024px": (2, 4096, 2432),
    "FLUX.1 1024px": (1, 4608, 3072),
    "Wan2.1-1.3B 480p 81f": (1, 32760, 1536),
    "Wan2.1-14B 480p 81f": (1, 32760, 5120),
    "Z-Image 1024px": (1, 4128, 3840),
    "LTX-Video 704x480 161f": (1, 6930, 2048),
}
# (batch, tokens, heads, head dim)
HEADS: dict[str, Shape] = {
    "SD3.5-medium 1024px": (2, 4096, 24, 64),
    "SD3.5-large 1024px": (2, 4096, 38, 64),
    "FLUX.1 1024px": (1, 4608, 24, 128),
    "Wan2.1-1.3B 480p 81f": (1, 32760, 12, 128),
    "Wan2.1-14B 480p 81f": (1, 32760, 40, 128),
    "Z-Image 1024px": (1, 4128, 30, 128),
    "LTX-Video 704x480 161f": (1, 6930, 32, 64),
}
# (batch, tokens, width of both halves)
HALVES: dict[str, Shape] = {
    "Z-Image 1024px": (1, 4128, 2 * 10240),
    "FLUX.2 1024px": (1, 4608, 2 * 18432),
}
# (steps, batch, tokens, width)
HISTORIES: dict[str, Shape] = {f"{name} order 2": (3, *shape) for name, shape in TOKENS.items()}
# (sites, steps, batch, tokens, width): attention and MLP of every block, except FLUX: one site a block
SITES: dict[str, Shape] = {
    "DiT-XL/2 512px order 1": (56, 2, *TOKENS["DiT-XL/2 512px"]),
    "SD3.5-medium 1024px order 0": (48, 1, *TOKENS["SD3.5-medium 1024px"]),
    "FLUX.1 1024px order 1": (57, 2, *TOKENS["FLUX.1 1024px"]),
}


@dataclass(frozen=True)
class Op:
    """One op as a benchmark.

    Attributes:
        name: Name in this table.
        dims: What the numbers of a shape mean.
        shapes: Shapes of real models.
        make: `(shape, dtype, device, generator) -> inputs`.
        run: `(inputs, backend) -> outputs` of our op.
        eager: The same of plain torch.
        outputs: Names of the outputs.
        wants_grad: Inputs that get a gradient in training; empty for an op without a derivative.
        elements: Elements of the activation that one forward call has to read and write.
        elements_backward: The same of backward.
        kernel: The raw op behind it, where that has another name.
    """

    name: str
    dims: str
    shapes: dict[str, Shape]
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Inputs]
    run: Callable[[Inputs, str | None], Outputs]
    eager: Callable[[Inputs], Outputs]
    outputs: tuple[str, ...]
    wants_grad: tuple[str, ...]
    elements: Callable[[Shape], int]
    elements_backward: Callable[[Shape], int] = field(default=lambda shape: 0)
    kernel: str = ""

    @property
    def function(self) -> str:
        """Name in `maskaccel.ops`."""
        return self.name.split(".")[0]

    @property
    def raw(self) -> str:
        """Name of the raw op behind it: the one that backends hold or lack."""
        return self.kernel or self.function

    def check_shape(self, shape: Shape) -> None:
        """Raise ValueError unless `shape` has the dims of this op."""
        count = self.dims.count(",") + 1
        if len(shape) != count or any(size < 1 for size in shape):
            raise ValueError(f"shape={shape} does not fit {self.name}; it takes {count} positive sizes: {self.dims}")

    def inputs(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0, grad: bool = False
    ) -> Inputs:
        """Random inputs, the same for every device; `grad` makes leaves of those in `wants_grad`."""
        self.check_shape(shape)
        made = self.make(shape, dtype, device, torch.Generator().manual_seed(seed))
        return self.with_grad(made) if grad else made

    def with_grad(self, inputs: Inputs) -> Inputs:
        """The inputs with those in `wants_grad` as leaves of a graph. Storage and strides are shared."""
        return {k: v.detach().requires_grad_() if k in self.wants_grad else v for k, v in inputs.items()}

    def in_double(self, inputs: Inputs) -> Inputs:
        """The inputs in fp64, for the truth."""
        return {k: _double(v) for k, v in inputs.items()}

    def bytes(self, shape: Shape, dtype: torch.dtype, *, backward: bool = False) -> int:
        """Bytes of activations that must be moved; modulation and weights are below a thousandth of it."""
        count = self.elements_backward(shape) if backward else self.elements(shape)
        return count * dtype.itemsize


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, torch.nn.RMSNorm):
        copy = torch.nn.RMSNorm(value.normalized_shape, eps=value.eps, device=value.weight.device, dtype=torch.float64)
        copy.weight.data.copy_(value.weight.data)
        return copy.requires_grad_(False)
    return value


def _normal(g: torch.Generator, dtype: torch.dtype, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=g) * scale).to(device=device, dtype=dtype)


def _stream(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, _, width = shape
    # Models modulate with chunks of one projection: rows are 6 D apart.
    parts = _normal(g, dtype, device, batch, 6 * width, scale=0.3).chunk(6, dim=1)
    return {
        "x": _normal(g, dtype, device, *shape),
        "a": _normal(g, dtype, device, *shape),
        "gate": parts[2],
        "scale": parts[1],
        "shift": parts[0],
    }


def _stream_of(*names: str) -> Callable[..., Inputs]:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
        made = _stream(shape, dtype, device, g)
        return {name: made[name] for name in names}

    return make


def _heads(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    _, length, _, dim = shape
    frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat_interleave(2, dim=1)
    made: Inputs = {
        "q": _normal(g, dtype, device, *shape),
        "k": _normal(g, dtype, device, *shape),
        "cos": angle.cos().float().to(device),
        "sin": angle.sin().float().to(device),
    }
    for name in ("q", "k"):
        norm = torch.nn.RMSNorm(dim, eps=1e-6, device=device, dtype=dtype).requires_grad_(False)
        norm.weight.data.copy_(1 + _normal(g, dtype, device, dim, scale=0.1))
        made[f"norm_{name}"] = norm
    return made


def _halves(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    return {"x": _normal(g, dtype, device, *shape)}


def _features(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    x = torch.randn(*shape, generator=g)
    near = x + 0.1 * torch.randn(*shape, generator=g)
    return {"x": x.to(device=device, dtype=dtype), "reference": near.to(device=device, dtype=dtype)}


def _history(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    made = _stream(shape[1:], dtype, device, g)
    # Taylor weights two steps after the last computed one
    coefficients = [2.0**k / math.factorial(k) for k in range(shape[0])]
    return {
        "history": _normal(g, dtype, device, *shape),
        "weights": torch.tensor(coefficients, device=device),
        "coefficients": coefficients,
        **{name: made[name] for name in ("x", "gate", "scale", "shift")},
    }


def _sites(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    sites, steps, batch, _, width = shape
    coefficients = [2.0**k / math.factorial(k) for k in range(steps)]
    # Every block has a projection of its own, of which two chunks are gates.
    gates = _normal(g, dtype, device, sites, batch, 6 * width, scale=0.3)[..., 2 * width : 3 * width]
    return {
        "history": _normal(g, dtype, device, *shape),
        "weights": torch.tensor([coefficients] * sites, device=device),
        "coefficients": coefficients,
        "x": _normal(g, dtype, device, *shape[2:]),
        "gates": gates,
    }


def _remembered(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    made = _stream(shape, dtype, device, g)
    return {"reference": made["a"], **{name: made[name] for name in ("x", "scale", "shift")}}


def _history_alone(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    return {"history": _normal(g, dtype, device, *shape)}


def _scattered(share: float, gamma: float) -> Callable[..., Inputs]:
    """Inputs of a step that computed a share of the tokens (ToCa), or one for each of 16 clusters (share 0, ClusCa)."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
        made = _history(shape, dtype, device, g)
        batch, n, width = shape[1:]
        count = max(1, int(share * n)) if share else min(16, n)
        index = torch.stack([torch.randperm(n, generator=g)[:count] for _ in range(batch)])
        labels = torch.randint(count, (batch, n), generator=g)
        labels.scatter_(1, index, torch.arange(count).expand(batch, -1))
        return {
            **made,
            "fresh": _normal(g, dtype, device, batch, count, width),
            "index": index.int().to(device),
            "labels": labels.int().to(device),
            "gamma": gamma,
        }

    return make


def _blobs(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    """Tokens around 16 centers that are far apart: the clusters are the same in every precision."""
    batch, n, width = shape
    k = min(16, n)
    x = 8 * torch.randn(batch, k, width, generator=g)[:, torch.arange(n) * k // n]
    return {"x": (x + torch.randn(*shape, generator=g)).to(device=device, dtype=dtype), "k": k, "iters": 4}


def _one(value: Any) -> Outputs:
    return (value,)


def _run_norm_modulate(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.norm_modulate(i["x"], i["scale"], i["shift"], backend=backend))


def _run_gate_residual_norm_modulate(i: Inputs, backend: str | None) -> Outputs:
    return tuple(ops.gate_residual_norm_modulate(i["x"], i["a"], i["gate"], i["scale"], i["shift"], backend=backend))


def _run_gate_residual(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.gate_residual(i["x"], i["a"], i["gate"], backend=backend))


def _run_qk_norm_rope(i: Inputs, backend: str | None) -> Outputs:
    weights = i["norm_q"].weight, i["norm_k"].weight
    return ops.qk_norm_rope(i["q"], i["k"], *weights, i["cos"], i["sin"], backend=backend)


def _run_relative_difference(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.relative_difference(i["x"], i["reference"], backend=backend))


def _run_combine_history(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.combine_history(i["history"], i["weights"], x=i["x"], gate=i["gate"], backend=backend))


def _run_combine_sites(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.combine_sites(i["history"], i["weights"], x=i["x"], gates=i["gates"], backend=backend))


def _run_gram(i: Inputs, backend: str | None) -> Outputs:
    return _one(ops.gram(i["history"], backend=backend))


def _run_scatter_combine(i: Inputs, backend: str | None) -> Outputs:
    out = ops.scatter_combine(
        i["history"], i["weights"], i["fresh"], i["index"], i["labels"],
        gamma=i["gamma"], x=i["x"], gate=i["gate"], backend=backend,
    )  # fmt: skip
    return _one(out)


def _run_kmeans(i: Inputs, backend: str | None) -> Outputs:
    _, centroids, _ = ops.kmeans(i["x"], i["k"], iters=i["iters"], metric="l1", backend=backend)
    return _one(centroids)


def _run_combine_history_norm_modulate(i: Inputs, backend: str | None) -> Outputs:
    operands = (i["history"], i["weights"], i["scale"], i["shift"])
    return ops.combine_history_norm_modulate(*operands, x=i["x"], gate=i["gate"], backend=backend)


def _run_norm_modulate_difference(i: Inputs, backend: str | None) -> Outputs:
    return ops.norm_modulate_difference(i["x"], i["reference"], i["scale"], i["shift"], backend=backend)


def _activation(kind: str, baseline: Callable[[Inputs], Outputs]) -> Op:
    def run(i: Inputs, backend: str | None) -> Outputs:
        return _one(ops.gated_activation(i["x"], kind, backend=backend))

    return Op(
        f"gated_activation.{kind}", "batch, tokens, width of both halves", HALVES, _halves, run, baseline,
        ("y",), ("x",),
        elements=lambda s: 3 * math.prod(s) // 2,
        elements_backward=lambda s: 5 * math.prod(s) // 2,
    )  # fmt: skip


_ALL = (
    Op(
        "norm_modulate", "batch, tokens, width", TOKENS, _stream_of("x", "scale", "shift"), _run_norm_modulate,
        eager.norm_modulate, ("y",), ("x", "scale", "shift"),
        elements=lambda s: 2 * math.prod(s),
        elements_backward=lambda s: 3 * math.prod(s),
    ),
    Op(
        "gate_residual_norm_modulate", "batch, tokens, width", TOKENS, _stream,
        _run_gate_residual_norm_modulate, eager.gate_residual_norm_modulate, ("r", "y"),
        ("x", "a", "gate", "scale", "shift"),
        elements=lambda s: 4 * math.prod(s),
        elements_backward=lambda s: 6 * math.prod(s),
    ),
    Op(
        "gate_residual", "batch, tokens, width", TOKENS, _stream_of("x", "a", "gate"), _run_gate_residual,
        eager.gate_residual, ("r",), ("x", "a", "gate"),
        elements=lambda s: 3 * math.prod(s),
        elements_backward=lambda s: 3 * math.prod(s),  # the gradient of x is the incoming one, passed on
    ),
    Op(
        "qk_norm_rope", "batch, tokens, heads, head dim", HEADS, _heads, _run_qk_norm_rope, eager.qk_norm_rope,
        ("q", "k"), ("q", "k"),
        elements=lambda s: 4 * math.prod(s),
        elements_backward=lambda s: 6 * math.prod(s),
    ),
    _activation("swiglu", eager.swiglu),
    _activation("geglu", eager.geglu),
    Op(
        "relative_difference", "batch, tokens, width", TOKENS, _features, _run_relative_difference,
        eager.relative_difference, ("sums",), (),
        elements=lambda s: 2 * math.prod(s),
    ),
    Op(
        "combine_history", "steps, batch, tokens, width", HISTORIES, _history, _run_combine_history,
        eager.combine_history, ("y",), (),
        elements=lambda s: math.prod(s) + 2 * math.prod(s[1:]),
    ),
    Op(
        "combine_sites", "sites, steps, batch, tokens, width", SITES, _sites, _run_combine_sites,
        eager.combine_sites, ("y",), (),
        elements=lambda s: math.prod(s) + 2 * math.prod(s[2:]),
    ),
    Op(
        "gram", "steps, batch, tokens, width", HISTORIES, _history_alone, _run_gram, eager.gram, ("products",), (),
        elements=math.prod,
    ),
    # The tokens that ToCa computes at a step of DiT.
    Op(
        "scatter_combine", "steps, batch, tokens, width", HISTORIES, _scattered(0.07, 0.0), _run_scatter_combine,
        eager.scatter_combine, ("y",), (),
        elements=lambda s: math.prod(s) + 2 * math.prod(s[1:]),
    ),
    # gamma 1 writes as much as any other and makes a repeated call the same as the first.
    Op(
        "scatter_combine.clusters", "steps, batch, tokens, width", HISTORIES, _scattered(0.0, 1.0),
        _run_scatter_combine, eager.scatter_combine, ("y",), (),
        elements=lambda s: math.prod(s) + 3 * math.prod(s[1:]),
    ),
    Op(
        "kmeans", "batch, tokens, width", TOKENS, _blobs, _run_kmeans, eager.kmeans, ("centroids",), (),
        elements=lambda s: 5 * math.prod(s),
    ),
    Op(
        "combine_history_norm_modulate", "steps, batch, tokens, width", HISTORIES, _history,
        _run_combine_history_norm_modulate, eager.combine_history_norm_modulate, ("h", "y"), (),
        elements=lambda s: math.prod(s) + 3 * math.prod(s[1:]),
    ),
    Op(
        "norm_modulate_difference", "batch, tokens, width", TOKENS, _remembered, _run_norm_modulate_difference,
        eager.norm_modulate_difference, ("y", "sums"), (),
        elements=lambda s: 3 * math.prod(s),
    ),
    *attention.entries(Op),
    *tokens.entries(Op),
)  # fmt: skip
OPS: dict[str, Op] = {op.name: op for op in _ALL}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name (`bf16` or `bfloat16`), or ValueError."""
    if name not in _DTYPE_NAMES:
        raise ValueError(f"dtype {name!r} is not known; allowed are {', '.join(_DTYPE_NAMES)}")
    return _DTYPE_NAMES[name]


def find(name: str) -> Op:
    """The op of that name, or ValueError with the names there are."""
    if name not in OPS:
        raise ValueError(f"op {name!r} is not known; allowed are {', '.join(OPS)}")
    return OPS[name]
