"""The calls of the token kernels that `compile_triton.py` compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

WIDTH, HEADS, HEAD_DIM, BATCH = 3072, 24, 128, 2
NARROW, PLUS_ONE, RMS, HALF, PRE_ROPE, NO_ROWS = 4, 8, 1, 32, 64, 1 << 10


def token_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of one activation dtype; names start with it."""
    from maskaccel.ops.tokens.triton import KERNELS

    prefix = "bf16" if dtype == torch.bfloat16 else "fp32"

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int32)

    def call(name: str, *args: Any) -> Callable[[], Any]:
        return lambda: KERNELS[name](*args)

    step = empty(1, dtype=torch.int64)
    if dtype == torch.bfloat16:
        yield from _id_cases(call, step, empty, ints)
    n, k = 4096, 1024
    x, rows, ids, inverse = empty(BATCH, n, WIDTH), empty(BATCH, k, WIDTH), ints(BATCH, k), ints(BATCH, n)
    gate, token = empty(BATCH, 6 * WIDTH).chunk(6, 1)[1][:, None], empty(BATCH, n, 6, WIDTH)[:, :, 1]
    vector, pos = empty(WIDTH), empty(1, n, WIDTH)
    yield f"{prefix} tokens gather", call("gather_rows", x, ids, inverse)
    yield f"{prefix} tokens gather narrow", call("gather_rows", empty(BATCH, n, 64), ids, None)
    yield f"{prefix} tokens segments", call("segment_rows", x, inverse, ints(BATCH, k + 1), inverse, True)
    merges: dict[str, tuple] = {
        "replace": (x, rows, ids, inverse, None, None, None, 0.0, 0),
        "add gated": (x, rows, ids, inverse, gate, None, None, 0.0, 1),
        "add gated by slot": (x, rows, ids, inverse, empty(BATCH, k, WIDTH), None, None, 0.0, 1),
        "mask token": (None, rows, ids, inverse, None, vector, pos, 0.0, 2),
        "blend": (x, rows, ids, inverse, None, None, None, 0.3, 3),
    }
    for name, args in merges.items():
        yield f"{prefix} tokens merge {name}", call("scatter_merge", *args)
        needs = 2 | (args[8] in (0, 3)) | 4 * (args[4] is not None) | 8 * (args[5] is not None)
        yield (
            f"{prefix} tokens merge backward {name}",
            call("scatter_merge_backward", x, rows, ids, inverse, args[4], args[7], args[8], needs),
        )
    modulated: dict[str, tuple] = {
        "layer": (gate, gate, None, None, 1e-6, 1.0, 0),
        "rms narrow by token": (token, token, vector, None, 1e-6, 1.0, RMS | NARROW | PLUS_ONE),
        "no rows": (gate, None, None, None, 1e-6, 1.0, NO_ROWS),
    }
    for name, args in modulated.items():
        yield f"{prefix} tokens gather+norm {name}", call("gather_modulate", x, ids, inverse, *args)
    q, cache = empty(BATCH, k, HEADS, HEAD_DIM), empty(BATCH, n, HEADS, HEAD_DIM)
    code, scale = empty(*cache.shape, dtype=torch.uint8), empty(BATCH, n, HEADS, dtype=torch.float32)
    table, weight = empty(n, HEAD_DIM // 2, 2, dtype=torch.float32), empty(HEAD_DIM)
    tables = (table[..., 0], table[..., 1])
    norm = (weight, weight)
    written: dict[str, tuple] = {
        "rms rope": (q, q, q, cache, cache, None, None, ids, *norm, *tables, None, 1e-6, RMS),
        "half, positions": (q, q, q, cache, cache, None, None, ids, *norm, *tables, ids, 1e-6, RMS | HALF),
        "fp8 before rope": (q, q, q, code, code, scale, scale, ids, *norm, *tables, None, 1e-6, RMS | PRE_ROPE),
        "fp8 as they are": (None, q, q, code, code, scale, scale, ids, *(None,) * 5, 1e-6, 2),
    }
    for name, args in written.items():
        yield f"{prefix} tokens write {name}", call("write_kv_rows", *args)
    yield f"{prefix} tokens read", call("read_kv_rows", code, scale, 0 if dtype == torch.float32 else 1)
    for width in (64, 1280):
        yield f"{prefix} tokens match {width}", call("match_tokens", empty(BATCH, n, width), ids, ids)
    logits, tokens = empty(BATCH, 64, 126464), empty(BATCH, 64, dtype=torch.int64)
    noise = empty(*logits.shape, dtype=torch.float32)
    for kind, name in enumerate(("probability", "margin", "entropy", "log")):
        given = noise if name == "margin" else None
        temperature = 0.0 if name == "log" else 0.7
        flags = kind | (4 if name == "entropy" else 0)
        yield (
            f"{prefix} tokens sample {name}",
            call("sample_logits", logits, tokens, step, given, 126336, 3, 0, temperature, flags),
        )


def _id_cases(call: Callable, step: torch.Tensor, empty: Callable, ints: Callable) -> Iterator[tuple[str, Callable]]:
    """Integers alone: rows of keys in registers, small ones in one program, and longer ones."""
    for n in (8192, 32768):
        quarter = n // 4
        force = empty(BATCH, n, dtype=torch.uint8)
        end = (7, 0, 0, BATCH, n, quarter)
        yield f"bf16 tokens keep {n}", call("random_keep", step, None, None, None, None, *end, 1, 0, 0)
        yield f"bf16 tokens keep cells {n}", call("random_keep", step, ints(n), None, None, None, *end, quarter, 0, 0)
        yield f"bf16 tokens keep forced {n}", call("random_keep", step, None, None, None, force, *end, 1, 0, 0)
        yield f"bf16 tokens keep grid {n}", call("random_keep", step, None, None, None, None, *end, 32, 16, 1)
        yield (
            f"bf16 tokens keep classes {n}",
            call("random_keep", step, None, ints(BATCH, n), ints(1, 2), None, *end, 1, 0, 2),
        )
        score, decay = empty(BATCH, n, dtype=torch.float32), empty(64, dtype=torch.float32)
        for flags in (0, 1):
            yield (
                f"bf16 tokens active {n} {flags}",
                call("select_active", score, ints(BATCH, n), decay, force, quarter, 0 if flags else 8, 0.5, flags),
            )
        tokens = empty(BATCH, n, dtype=torch.int64)
        for groups in (None, ints(BATCH, n)):
            count = ints(BATCH, 1 if groups is None else 32)
            yield (
                f"bf16 tokens unmask {n}{'' if groups is None else ' groups'}",
                call("unmask_select", score, tokens, tokens, step, count, groups, None, None, 9, 7, 0, 0.9, 0.5),
            )
