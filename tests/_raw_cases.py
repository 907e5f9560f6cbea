"""Random calls of every raw op, over the whole contract of the schemas; for the emulated and the GPU kernel tests.

Needs torch alone, so that `benchmarks/gpu/run.py` can use it where pytest is not installed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import _raw_attention
import _raw_tokens
import torch
from torch import Tensor

from maskaccel.ops.adaln import fallback
from maskaccel.ops.adaln import schema as adaln_schema
from maskaccel.ops.adaln.flags import packed
from maskaccel.ops.adaln.schema import CLIP, NEED_A, NEED_X, NO_RESIDUAL
from maskaccel.ops.attention import reference as attention_reference
from maskaccel.ops.attention import schema as attention_schema
from maskaccel.ops.attention.serves import most_pruned_rows
from maskaccel.ops.steps import reference as steps_reference
from maskaccel.ops.tokens import reference as tokens_reference
from maskaccel.ops.tokens import schema as tokens_schema

WIDTHS = (3, 7, 8, 24, 72, 130, 256, 520, 1000, 1024, 1032, 1152, 1536)
ADALN = (
    "norm_modulate", "norm_modulate_pair", "norm_modulate_backward", "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_pair", "gate_residual_norm_modulate_backward", "gate_residual",
    "gate_residual_backward", "qk_norm_rope", "qk_norm_rope_backward", "gated_activation", "gated_activation_backward",
)  # fmt: skip


def plain(op: str) -> Callable[..., Any]:
    """The op in plain torch: the fallback, which also runs in fp64."""
    kernels = {**steps_reference.KERNELS, **attention_reference.KERNELS, **tokens_reference.KERNELS}
    return kernels[op] if op in kernels else getattr(fallback, op)


def run(op: str, kernel: Callable[..., Any], args: tuple) -> tuple[Tensor, ...]:
    """What a call gives that can be compared: its results and what it wrote, which `args` do not see."""
    if op in _raw_attention.DRAWS:
        return _raw_attention.run(op, kernel, args)
    if op in _raw_tokens.DRAWS:
        return _raw_tokens.run(op, kernel, args)
    if op == "scatter_combine":
        history = args[0].clone()
        return kernel(history, *args[1:]), history
    out = kernel(*args)
    if op == "kmeans":
        labels, centroids, chosen = out
        distance = steps_reference.distances(args[0].double(), centroids.double(), args[-1]).mT
        member = labels[:, None] == torch.arange(args[2], device=labels.device)[:, None]
        least = torch.where(member, distance, torch.inf).amin(2)
        # Which of two equally near members is a matter of rounding; here every cluster has members.
        far = distance.gather(2, chosen.long()[..., None])[..., 0] > least * (1 + 1e-4) + 1e-5
        strange = labels.gather(1, chosen.long()) != torch.arange(args[2], device=labels.device)
        return labels.to(centroids.dtype), centroids, (far | strange).to(centroids.dtype)
    return out if isinstance(out, tuple) else (out,)


def run_plain(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The results of plain torch. Gradients of activations are always formed there: the plain form builds on them."""
    if op in _raw_attention.DRAWS:
        return _raw_attention.run_plain(op, args)
    if op in _raw_tokens.DRAWS:
        return _raw_tokens.run_plain(op, args)
    if op.endswith("_backward") and op != "gated_activation_backward":
        args = (*args[:-1], args[-1] | NEED_X | NEED_A)
    return run(op, plain(op), args)


def wanted(got: tuple[Tensor, ...], *others: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Leaves out results that the op under test was not asked for."""
    at = [i for i, g in enumerate(got) if g.numel() or not others[0][i].numel()]
    return [tuple(t[i] for i in at) for t in (got, *others)]


def widened(args: tuple) -> tuple:
    """The same call in fp64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


class Draw:
    """Draws the operands of one call."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu", widths: tuple[int, ...] = WIDTHS) -> None:
        self.rng, self.dtype, self.device = random.Random(seed), dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.widths = widths
        self.other = self.rng.choice([dtype, torch.float32])  # dtype of modulation
        self.affine = self.rng.choice([dtype, torch.float32])

    def maybe(self, make: Callable[..., Tensor], *args: Any, p: float = 0.7) -> Tensor | None:
        return make(*args) if self.rng.random() < p else None

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, strided: bool = True) -> Tensor:
        """Random values, contiguous or as the views models pass: chunks, swapped leading dims, odd offsets."""
        form = self.rng.choice(["dense", "dense", "chunk", "swapped", "odd"]) if strided else "dense"
        *lead, last = shape
        if form == "swapped" and len(shape) > 2:
            lead = [lead[1], lead[0], *lead[2:]]
        extra = {"chunk": 3 * last, "odd": last + 3}.get(form, last)
        base = (torch.randn(*lead, extra, generator=self.generator) * scale).to(dtype).to(self.device)
        if form == "chunk":
            base = base[..., last : 2 * last]
        elif form == "odd":
            base = base[..., 1 : last + 1]
        return base.transpose(0, 1) if form == "swapped" and len(shape) > 2 else base

    def vector(self, size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return self.tensor((size,), dtype, scale, strided=False)

    def adaln_shape(self) -> tuple[int, int, int]:
        return self.rng.choice([1, 2, 3]), self.rng.choice([1, 4, 6, 12]), self.rng.choice(self.widths)

    def modulation(self, shape: tuple[int, int, int], rows: Tensor | None, count: int, scale: float = 0.5) -> Tensor:
        batch, n, d = shape
        if rows is not None:
            return self.tensor((count, d), self.other, scale)
        b = self.rng.choice([1, batch])
        frames = self.rng.choice([f for f in range(1, n + 1) if n % f == 0])
        return self.tensor(self.rng.choice([(b, d), (b, 1, d), (b, frames, d), (b, n, d)]), self.other, scale)

    def rows(self, shape: tuple[int, int, int], count: int) -> Tensor | None:
        if self.rng.random() < 0.75:
            return None
        size = self.rng.choice([(shape[1],), shape[:2]])
        return torch.randint(0, count, size, generator=self.generator, dtype=torch.int32).to(self.device)

    def norm_flags(self) -> int:
        return self.rng.choice([0, 1, 2]) | self.rng.choice([0, 4]) | self.rng.choice([0, 8])

    def gate_flags(self, allow_clip: bool) -> int:
        return self.rng.choice([0, 16, 32, 48]) | self.rng.choice([0, 64, 128]) | (CLIP if allow_clip else 0)


def _norm_operands(d: Draw, shape: tuple, pair: bool, rows: Tensor | None, count: int) -> tuple[list, list]:
    width = shape[2]
    modulation = [d.maybe(d.modulation, shape, rows, count) for _ in range(4 if pair else 2)]
    rest = [d.maybe(d.vector, width, d.affine, p=0.4), d.maybe(d.vector, width, d.affine, p=0.3)]
    rest += [d.maybe(d.vector, width, d.other, 0.5, p=0.3) for _ in range(2)]
    return modulation, [*rest, rows]


def _gate_operands(d: Draw, shape: tuple, rows: Tensor | None, count: int) -> list:
    return [
        d.maybe(d.modulation, shape, rows, count, 1.5),
        d.maybe(d.vector, shape[2], d.other, p=0.3),
        d.maybe(d.vector, shape[2], d.affine, p=0.5),
    ]


def _needs(d: Draw, bits: int) -> int:
    return (1 << bits) - 1 if d.rng.random() < 0.6 else d.rng.randrange(1 << bits)


def _adaln(op: str, d: Draw) -> tuple:
    shape, count = d.adaln_shape(), 5
    rows = d.rows(shape, count)
    pair, backward, gated = op.endswith("_pair"), op.endswith("_backward"), op.startswith("gate")
    normed = "norm" in op
    second = pair or (backward and normed and d.rng.random() < 0.4)
    if normed:
        modulation, rest = _norm_operands(d, shape, True, rows, count)
        scalars = [1e-5, *([1e-6] if gated else []), d.rng.choice([1.0, 0.0])]
    x = d.tensor(shape, d.dtype) + (d.rng.choice([0.0, 4.0]))
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    flags = d.norm_flags() | (d.gate_flags(not backward) if gated else 0)
    grads = [d.tensor(shape, d.dtype) for _ in range(3)]
    gate = _gate_operands(d, shape, rows, count) if gated else []
    a = d.tensor(shape, d.dtype)
    if not normed:
        if backward:
            return (grads[0], a, *gate, rows, 1e-6, flags, _needs(d, 10))
        return (x, a, *gate, rows, 1e-6, flags)
    if backward:
        if not second:
            modulation[2:] = [None, None]
        dy2 = grads[2] if second else None
        needs = _needs(d, 10) & ~(0 if second else 32 | 64)
        head = [d.maybe(lambda: grads[0], p=0.7)] if gated else []
        return (*head, grads[1], dy2, x, *([a] if gated else []), *gate, *modulation, *rest, *scalars, flags, needs)
    if gated and d.rng.random() < 0.3:
        flags |= NO_RESIDUAL
    return (x, *([a] if gated else []), *gate, *modulation[: 4 if pair else 2], *rest, *scalars, flags)


def _qk(op: str, d: Draw) -> tuple:
    across = d.rng.random() < 0.4
    batch, tokens = d.rng.choice([1, 2]), d.rng.choice([1, 5, 9])
    heads, dim = d.rng.choice([1, 2, 3, 8]), d.rng.choice([2, 6, 8, 16, 36, 64, 72, 128, 264])
    with_rope = d.rng.random() < 0.8
    k_heads, k_tokens = (heads, tokens) if with_rope else (d.rng.choice([1, heads]), d.rng.choice([tokens, 3]))
    q, k = d.tensor((batch, tokens, heads, dim), d.dtype), d.tensor((batch, k_tokens, k_heads, dim), d.dtype)
    widths = [h * dim if across else dim for h in (heads, k_heads)]
    vectors = [d.maybe(d.vector, w, d.affine, p=p) for p in (0.6, 0.3) for w in widths]
    cos = sin = positions = None
    if with_rope:
        table = d.rng.choice([dim, dim // 2])
        length = tokens
        if d.rng.random() < 0.4:
            length = tokens + 3
            size = d.rng.choice([(tokens,), (batch, tokens)])
            positions = torch.randint(0, length, size, generator=d.generator, dtype=torch.int32).to(d.device)
        b, h = d.rng.choice([1, batch]), d.rng.choice([1, heads])
        shape = d.rng.choice([(length, table), (b, length, table), (b, length, h, table)])
        cos, sin = d.tensor(shape, d.other), d.tensor(shape, d.other)
        if d.rng.random() < 0.3:  # the two parts of a complex table
            both = torch.view_as_real(torch.complex(cos.float(), sin.float()))
            cos, sin = both[..., 0], both[..., 1]
    flags = d.norm_flags() | (16 if across else 0) | d.rng.choice([0, 32])
    if op == "qk_norm_rope":
        return (q, k, *vectors, cos, sin, positions, 1e-6, flags)
    grads = [d.tensor(tuple(t.shape), d.dtype) for t in (q, k)]
    return (*grads, q, k, *vectors, cos, sin, positions, 1e-6, flags, _needs(d, 6))


def _activation(op: str, d: Draw) -> tuple:
    kind, width, rows = d.rng.choice([0, 1, 2]), d.rng.choice(d.widths), d.rng.choice([1, 5, 40])
    lead = d.rng.choice([(rows,), (2, rows), (1, rows, 1), ()])  # of more dims than one no stride reaches all rows
    x = d.tensor((*lead, width * (1 if kind == 2 else 2)), d.dtype, 2.0, strided=len(lead) == 1)
    flags = kind | (d.rng.choice([0, 4]) if kind < 2 else 0)
    dy = d.tensor((*lead, width), d.dtype, strided=len(lead) == 1)
    return (x, flags) if op == "gated_activation" else (dy, x, flags)


def _relative_difference(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    shape = d.rng.choice([(batch, n, width), (batch, width), (batch, 3, n, width)])
    x, reference = (d.tensor(shape, d.dtype, strided=False) for _ in range(2))
    return x, reference, d.maybe(d.tensor, shape, d.dtype, 1.0, False)


def _combine_history(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    terms = d.rng.choice([1, 2, 5, 16])
    history = d.tensor((terms, batch, n, width), d.dtype, strided=False)
    weights = d.tensor(d.rng.choice([(terms,), (terms, width)]), torch.float32, strided=False)
    x = d.maybe(d.tensor, (batch, n, width), d.dtype, 1.0, False)
    return history, weights, x, d.maybe(d.modulation, (batch, n, width), None, 0)


def _combine_sites(d: Draw) -> tuple:
    batch, n, width = shape = d.adaln_shape()
    sites, terms = d.rng.choice([1, 2, 5]), d.rng.choice([1, 2, 3, 7])
    history = d.tensor((terms, sites, batch, n, width), d.dtype, strided=False).transpose(0, 1)
    weights = d.rng.choice([(terms,), (sites, terms), (sites, terms, width)])
    frames = d.rng.choice([f for f in range(1, n + 1) if n % f == 0])
    b = d.rng.choice([1, batch])
    gates = d.maybe(d.tensor, d.rng.choice([(sites, b, width), (sites, b, frames, width)]), d.other)
    x = d.maybe(d.tensor, shape, d.dtype, 1.0, False)
    return history, d.tensor(weights, torch.float32, strided=False), x, gates


def _gram(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    base = d.tensor((batch, d.rng.choice([1, 2, 3, 4, 5, 9, 16]), n, width), d.dtype, strided=False)
    return base.transpose(0, 1), d.rng.random() < 0.5


def _normed(d: Draw, shape: tuple[int, int, int]) -> tuple:
    """The operands of a norm from `scale` on."""
    rows = d.rows(shape, 5)
    modulation, rest = _norm_operands(d, shape, False, rows, 5)
    return *modulation, *rest, 1e-5, d.rng.choice([1.0, 0.0]), d.norm_flags()


def _combine_history_norm_modulate(d: Draw) -> tuple:
    shape = d.adaln_shape()
    stored = d.rng.choice([torch.float32, torch.bfloat16, torch.float16])
    x = d.maybe(d.tensor, shape, d.dtype, 1.0, False)
    terms = d.rng.choice([1, 2, 3, 16])
    history = d.tensor((shape[0], terms, *shape[1:]), d.dtype if x is None else stored, strided=False).transpose(0, 1)
    weights = d.tensor(d.rng.choice([(terms,), (terms, shape[2])]), torch.float32, strided=False)
    return history, weights, x, d.maybe(d.modulation, shape, None, 0), *_normed(d, shape)


def _norm_modulate_difference(d: Draw) -> tuple:
    shape = d.adaln_shape()
    return d.tensor(shape, d.dtype), d.tensor(shape, d.dtype), *_normed(d, shape)


def _scatter_combine(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    terms, count = d.rng.choice([1, 2, 5]), d.rng.choice([0, 1, 3, 9])
    if d.rng.random() < 0.5:
        history = d.tensor((terms, batch, n, width), d.dtype, strided=False)
    else:
        history = d.tensor((batch, terms, n, width), d.dtype, strided=False).transpose(0, 1)
    weights = d.tensor(d.rng.choice([(terms,), (terms, width)]), torch.float32, strided=False)
    fresh = d.tensor((batch, count, width), d.dtype, strided=False)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=d.generator, dtype=torch.int32).to(d.device)

    labels = d.maybe(integers, 4, batch, n)
    gamma = 0.0 if labels is None else d.rng.choice([0.0, 0.005, 0.5, 1.0])
    x = d.maybe(d.tensor, (batch, n, width), d.dtype, 1.0, False)
    gate = d.maybe(d.modulation, (batch, n, width), None, 0)
    return history, weights, fresh, integers(n, batch, count), labels, x, gate, d.rng.randrange(terms), gamma


def _kmeans(d: Draw) -> tuple:
    """Tokens around centers that are far apart, so that the clusters are no matter of rounding."""
    batch, k, width = d.rng.choice([1, 2]), d.rng.choice([1, 3, 17]), d.rng.choice([w for w in d.widths if w >= 24])
    n = k * d.rng.choice([3, 7])
    spread = 8 * torch.randn(batch, k, width, generator=d.generator)
    x = spread[:, torch.arange(n) * k // n].to(d.dtype).to(d.device) + d.tensor(
        (batch, n, width), d.dtype, strided=False
    )
    if d.rng.random() < 0.5:  # a view of longer rows
        x = torch.cat([x, x], 2)[..., :width]
    init = d.maybe(lambda: (spread + 1).to(d.device), p=0.5)
    return x, init, k, d.rng.choice([0, 1, 3]), d.rng.choice([0, 1, 2])


STEPS: dict[str, Callable[[Draw], tuple]] = {
    "relative_difference": _relative_difference,
    "combine_history": _combine_history,
    "combine_sites": _combine_sites,
    "gram": _gram,
    "combine_history_norm_modulate": _combine_history_norm_modulate,
    "norm_modulate_difference": _norm_modulate_difference,
    "scatter_combine": _scatter_combine,
    "kmeans": _kmeans,
}


OPS = (*ADALN, *STEPS, *_raw_attention.DRAWS, *_raw_tokens.DRAWS)


def draw(op: str, seed: int, dtype: torch.dtype, device: str = "cpu", widths: tuple[int, ...] = WIDTHS,
         lengths: tuple[int, ...] = _raw_attention.LENGTHS) -> tuple:  # fmt: skip
    """Arguments of one random call of a raw op; `lengths` are of attention, `widths` of the others."""
    if op in _raw_attention.DRAWS:
        return _raw_attention.draw(op, seed, dtype, device, lengths)
    d = Draw(seed, dtype, device, widths)
    if op in STEPS or op in _raw_tokens.DRAWS:
        return (STEPS.get(op) or _raw_tokens.DRAWS[op])(d)
    if op.startswith("qk"):
        return _qk(op, d)
    return _activation(op, d) if op.startswith("gated_activation") else _adaln(op, d)


# The ops for calls without rare operands, by name: the schemas of the whole ops, and the operands that a call lacks.
_FAMILIES = (
    (adaln_schema, {"gate_table", "post_weight", "weight", "bias", "scale_table", "shift_table", "rows", "q_bias",
                    "k_bias", "positions"}),
    (attention_schema, {"index_t", "count_t", "order_t", "bias", "relpos_table", "relpos_q", "relpos_k",
                        "reference_lse", "out_scale", "out_add"}),
    (tokens_schema, {"weight", "bias", "k_scale", "v_scale", "positions"}),
)  # fmt: skip


def whole_of(name: str) -> str:
    """The op that a bare one is another call of."""
    return name.removesuffix("_bare").removesuffix("_tested")


BARE = {name: (family.SCHEMAS[whole_of(name)], rare) for family, rare in _FAMILIES for name in family.BARE}
_NUMBERS = {"eps", "post_eps", "offset", "flags", "bm", "bn", "scale", "skip_threshold"}


def bare_differs(name: str, seed: int, dtype: torch.dtype, kernel: Callable[..., Any], whole: Callable[..., Any],
                 device: str = "cpu") -> str:  # fmt: skip
    """Where a random call of a bare op does not give the bits of the whole op; empty where it does."""
    if device == "cuda" and name in attention_schema.BARE and dtype == torch.float32:
        return ""  # which the CUDA kernels do not take
    args, rest = draw_bare(name, seed, dtype, device)
    written = [_cloned(args), _cloned(rest)]
    got, want = (t if isinstance(t, tuple) else (t,) for t in (kernel(*written[0]), whole(*written[1])))
    if name.startswith("write_kv_rows"):
        got, want = (*got, *written[0][3:5]), (*want, *written[1][3:5])
    same = all(map(torch.equal, got, want)) and len(got) in (len(want), len(want) - 1)
    return "" if same else f"seed {seed} is not {whole_of(name)}: {describe(args)}"


def _cloned(args: tuple) -> tuple:
    return tuple(t.clone(memory_format=torch.preserve_format) if isinstance(t, Tensor) else t for t in args)


def draw_bare(name: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> tuple[tuple, tuple]:
    """Arguments of one random call of a bare op, and of the whole op for the same results."""
    op = whole_of(name)
    schema, rare = BARE[name]
    names = [part.split()[-1] for part in schema[1 : schema.index(") ->")].split(",")]
    whole = dict(zip(names, draw(op, seed, dtype, device), strict=True))
    absent = set(rare)
    if whole.get("rows") is not None:  # (R, D) operands mean something else without the index
        absent |= {"gate", "scale", "shift", "scale2", "shift2"}
    if whole.get("positions") is not None:  # and these tables have rows of their own
        absent |= {"cos", "sin"}
    if name == "tile_attention_tested_bare":
        rare = rare - {"reference_lse"}
        absent -= {"reference_lse"}
    whole |= dict.fromkeys(absent & whole.keys())
    numbers: tuple
    if name in attention_schema.BARE:
        numbers = (attention_schema.packed(whole["bm"], whole["bn"], whole["scale"]),)
        if name == "tile_attention_tested_bare":
            if whole["bm"] > most_pruned_rows(whole["q"].shape[3]):
                whole["flags"] &= ~attention_schema.PRUNE
            numbers += (attention_schema.packed_test(whole["flags"], whole["skip_threshold"]),)
        else:
            whole |= {"flags": 0, "skip_threshold": 0.0}
        operands = rare | _NUMBERS
    elif op == "random_keep":
        whole |= {"order": None, "labels": None, "quota": None, "force": None, "groups": 1, "rows_kept": 0, "mode": 0}
        pairs = (whole["batch"] | whole["route"] << 32, whole["n"] | whole["keep"] << 32)
        numbers = (whole["seed"], whole["offset"], *pairs)
        operands = whole.keys() - {"step"}
    else:
        whole |= dict.fromkeys({"eps", "post_eps"} & whole.keys(), 1e-5)
        numbers = (packed(whole["flags"], 1e-5, whole.get("offset", 0.0)),)
        operands = rare | (_NUMBERS - {"scale"})
    if op == "write_kv_rows":  # whose ids are distinct, and caches not fp8
        size = whole["k_cache"].shape[1]
        drawn = torch.rand(whole["ids"].shape[0], size, generator=torch.Generator().manual_seed(seed)).argsort(1)
        whole["ids"] = drawn[:, : whole["k"].shape[1]].to(torch.int32).contiguous().to(device)
        for cache in ("k_cache", "v_cache"):
            whole[cache] = whole[cache].to(dtype)
    return (*(value for key, value in whole.items() if key not in operands), *numbers), tuple(whole.values())


def describe(args: tuple) -> str:
    """One line for a failure message."""
    return ", ".join(
        f"{str(a.dtype).removeprefix('torch.')}{tuple(a.shape)}/{tuple(a.stride())}"
        if isinstance(a, Tensor)
        else repr(a)
        for a in args
    )
