"""Calls of the ops at the shapes of models, recorded as launches by the host emulation of the kernels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .trace import Launch

LAYER, RMS, NARROW = 0, 1, 4
BIG = 1 << 20  # smaller operands stay in a cache


SOURCES = ("cuda_norm.cu", "cuda_norm_backward.cu", "cuda_qk.cu", "cuda_steps.cu", "cuda_scatter.cu", "cuda_gather.cu",
           "cuda_gather_modulate.cu", "cuda_scatter_merge.cu", "cuda_kv.cu")  # fmt: skip


class Case(NamedTuple):
    """An op at a shape."""

    name: str
    source: str  # the .cu file
    call: Callable[[Any], Any]  # with the namespace of the ops
    operands: list[torch.Tensor]
    moved: int  # bytes that must be read and written once

    @property
    def readable(self) -> list[tuple[int, int]]:
        """Address ranges of the operands."""
        return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in self.operands if t.numel()]

    @property
    def streams(self) -> list[tuple[int, int]]:
        """Address ranges of the large operands, which come from memory."""
        return [r for r in self.readable if r[1] - r[0] >= BIG]


def _new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)  # nothing reads the values


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


MODELS = {  # (B, N, D), frames or samples that share modulation
    "FLUX": (1, 4608, 3072), "SD3.5-M": (2, 4429, 1536), "SD3.5-L": (2, 4429, 2432), "Wan-1.3B": (1, 32760, 1536),
    "Wan-14B": (1, 32760, 5120), "Wan-14B 720p": (1, 75600, 5120),
}  # fmt: skip
HEADS = {"FLUX": (1, 4608, 24, 128), "SD3.5-L": (2, 4429, 38, 64), "Wan-14B": (1, 32760, 40, 128)}


def norms(law: int = 0) -> Iterator[Case]:
    """The adaLN ops, forward and backward."""
    for model, (b, n, d) in MODELS.items():
        x, a, mods = _new(b, n, d), _new(b, n, d), [_new(b, d) for _ in range(3)]
        size = _bytes(x)
        if model == "FLUX" or law == 0:
            yield Case(
                f"norm_modulate {model}", "cuda_norm.cu",
                lambda ops, x=x, m=mods: ops.norm_modulate(x, m[0], m[1], None, None, None, None, None, 1e-6, 1.0, law),
                [x, *mods], 2 * size,
            )  # fmt: skip
        yield Case(
            f"gate_residual_norm_modulate {model}", "cuda_norm.cu",
            lambda ops, x=x, a=a, m=mods: ops.gate_residual_norm_modulate(
                x, a, m[2], None, None, m[0], m[1], None, None, None, None, None, 1e-6, 1e-6, 1.0, law
            ),
            [x, a, *mods], 4 * size,
        )  # fmt: skip


def gradients() -> Iterator[Case]:
    """The adaLN ops, backward."""
    for model, (b, n, d) in MODELS.items():
        x, a, dr, dy = (_new(b, n, d) for _ in range(4))
        mods = [_new(b, d) for _ in range(3)]
        size = _bytes(x)
        yield Case(
            f"norm_modulate_backward {model}", "cuda_norm_backward.cu",
            lambda ops, x=x, dy=dy, m=mods: ops.norm_modulate_backward(
                dy, None, x, m[0], m[1], None, None, None, None, None, None, None, 1e-6, 1.0, 0, 1 | 8 | 16
            ),
            [x, dy, *mods], 3 * size,
        )  # fmt: skip
        yield Case(
            f"gate_residual_norm_modulate_backward {model}", "cuda_norm_backward.cu",
            lambda ops, x=x, a=a, dr=dr, dy=dy, m=mods: ops.gate_residual_norm_modulate_backward(
                dr, dy, None, x, a, m[2], None, None, m[0], m[1], None, None, None, None, None, None, None,
                1e-6, 1e-6, 1.0, 0, 1 | 2 | 4 | 8 | 16,
            ),
            [x, a, dr, dy, *mods], 6 * size,
        )  # fmt: skip


def heads() -> Iterator[Case]:
    """QK norm and RoPE. Wan's norm goes across heads."""
    for model, (b, s, h, dim) in HEADS.items():
        q, k, dq, dk = (_new(b, s, h, dim) for _ in range(4))
        across = 16 if model.startswith("Wan") else 0
        w = [_new(h * dim if across else dim) for _ in range(2)]
        rope = not model.startswith("SD3")
        full = dim if model == "FLUX" else dim // 2
        cos, sin = (_new(s, full, dtype=torch.float32) if rope else None for _ in range(2))
        tables = [t for t in (cos, sin) if t is not None]
        head = (*w, None, None, cos, sin, None, 1e-6, RMS | across)
        yield Case(
            f"qk_norm_rope {model}", "cuda_qk.cu", lambda ops, q=q, k=k, c=head: ops.qk_norm_rope(q, k, *c),
            [q, k, *w, *tables], 4 * _bytes(q) + _bytes(*tables),
        )  # fmt: skip
        yield Case(
            f"qk_norm_rope_backward {model}", "cuda_qk.cu",
            lambda ops, q=q, k=k, dq=dq, dk=dk, c=head: ops.qk_norm_rope_backward(dq, dk, q, k, *c, 3),
            [q, k, dq, dk, *w, *tables], 6 * _bytes(q) + _bytes(*tables),
        )  # fmt: skip


def steps() -> Iterator[Case]:
    """Cached features."""
    for model, (b, n, d) in (("FLUX", MODELS["FLUX"]), ("Wan-14B", MODELS["Wan-14B"])):
        x, reference = _new(b, n, d), _new(b, n, d)
        size = _bytes(x)
        yield Case(
            f"relative_difference {model}", "cuda_steps.cu",
            lambda ops, x=x, r=reference: ops.relative_difference(x, r, None), [x, reference], 2 * size,
        )  # fmt: skip
        history, w, gate = _new(3, b, n, d), torch.ones(3), _new(b, d)
        for terms in (1, 2, 3):
            part, weights = history[:terms], w[:terms]
            yield Case(
                f"combine_history K={terms} {model}", "cuda_steps.cu",
                lambda ops, x=x, h=part, w=weights, g=gate: ops.combine_history(h, w, x, g),
                [x, history, w, gate], (terms + 2) * size,
            )  # fmt: skip
        rows = n // 8
        index = torch.arange(0, n, 8, dtype=torch.int32).repeat(b, 1)
        fresh = _new(b, rows, d)
        yield Case(
            f"scatter_combine K=2 {model}", "cuda_scatter.cu",
            lambda ops, x=x, h=history[:2], w=w[:2], f=fresh, i=index, g=gate: ops.scatter_combine(
                h, w, f, i, None, x, g, 0, 0.0
            ),
            [x, history, w, gate, fresh, index], (2 + 2) * size + _bytes(fresh),
        )  # fmt: skip


def tokens() -> Iterator[Case]:
    """Dropped tokens: half are kept."""
    b, n, d = 1, 4096, 3072
    kept = n // 2
    ids = torch.arange(0, n, 2, dtype=torch.int32)[None]
    inverse = torch.full((1, n), -1, dtype=torch.int32)
    inverse[0, ids[0].long()] = torch.arange(kept, dtype=torch.int32)
    x, rows, mods = _new(b, n, d), _new(b, kept, d), [_new(b, d) for _ in range(3)]
    size, part = _bytes(x), _bytes(rows)
    yield Case("gather_rows FLUX", "cuda_gather.cu", lambda ops: ops.gather_rows(x, ids, None), [x, ids], 2 * part)
    yield Case(
        "gather_modulate FLUX", "cuda_gather_modulate.cu",
        lambda ops: ops.gather_modulate(x, ids, inverse, mods[0][:, None], mods[1][:, None], None, None, 1e-6, 1.0, 0),
        [x, ids, inverse, *mods], 3 * part,
    )  # fmt: skip
    yield Case(
        "scatter_merge replace FLUX", "cuda_gather.cu",
        lambda ops: ops.scatter_merge(x, rows, ids, inverse, None, None, None, 0.0, 0), [x, rows, ids, inverse],
        2 * size,
    )  # fmt: skip
    yield Case(
        "scatter_merge add_gated FLUX", "cuda_scatter_merge.cu",
        lambda ops: ops.scatter_merge(x, rows, ids, inverse, mods[2][:, None], None, None, 0.0, 1),
        [x, rows, ids, inverse, *mods], 2 * size + part,
    )  # fmt: skip
    h, dim = 24, 128
    q, k, v = (_new(b, kept, h, dim) for _ in range(3))
    cache, w = [_new(b, n, h, dim) for _ in range(2)], [_new(dim) for _ in range(2)]
    cos, sin = (_new(n, dim, dtype=torch.float32) for _ in range(2))
    yield Case(
        "write_kv_rows FLUX", "cuda_kv.cu",
        lambda ops: ops.write_kv_rows(q, k, v, *cache, None, None, ids, *w, cos, sin, None, 1e-6, RMS),
        [q, k, v, *cache, *w, cos, sin, ids], 6 * _bytes(q) + _bytes(cos, sin) // 2,
    )  # fmt: skip


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "norms": norms, "narrow": lambda: norms(NARROW), "gradients": gradients, "heads": heads, "steps": steps,
    "tokens": tokens,
}  # fmt: skip


def record(case: Case, ops: Any, multiprocessors: int, capability: int) -> list[Launch]:
    """The launches of a call on a device of so many multiprocessors. Nothing is computed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        settings = {"RECORD": str(path), "MULTIPROCESSORS": str(multiprocessors), "SHARED": str(227 * 1024),
                    "CAPABILITY": str(capability)}  # fmt: skip
        os.environ.update({f"MASKACCEL_EMULATE_{k}": v for k, v in settings.items()})
        try:
            case.call(ops)
        finally:
            for k in settings:
                del os.environ[f"MASKACCEL_EMULATE_{k}"]
        lines = path.read_text().splitlines()
    found = []
    for line in lines:
        name, x, y, z, threads, shared, argument = line.split()
        found.append(Launch(name, (int(x), int(y), int(z)), int(threads), int(shared), bytes.fromhex(argument)))
    return found
