"""Calls of the Triton kernels that match rows and draw discrete tokens; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from ..attention.triton_config import precision
from .schema import PURPOSE_SAMPLE, PURPOSE_SELECT, SCALED
from .triton_check import check_ids, check_rows, random_stream
from .triton_launch_select import KEYS, MAX_TOKENS, blocks_of


def match_tokens(metric: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    host.check_activation("metric", metric)
    batch, n, width = metric.shape
    src_batch = check_ids("src", src, batch, metric.device)
    dst_batch = check_ids("dst", dst, batch, metric.device)
    sources, targets = src.shape[1], dst.shape[1]
    if not targets:
        raise RuntimeError(f"dst must hold at least one id, got {tuple(dst.shape)}")
    best = src.new_empty(batch, sources)
    similarity = metric.new_empty(batch, sources, dtype=torch.float32)
    if not best.numel():
        return best, similarity
    from .._triton_lib import row_scales
    from .triton_match import match_rows

    lengths = metric.new_empty(batch, n, dtype=torch.float32)
    strides = metric.stride()[:2]
    if n:
        host.launch(row_scales, (n, batch), metric, metric, lengths, *strides, n, width,
                    BLOCK=min(max(host.power_of_two(width), 32), 1024), num_warps=4)  # fmt: skip
    exact = metric.dtype == torch.float32
    host.launch(match_rows, (math.ceil(sources / 64), batch), metric, metric, lengths, src, dst, best, similarity,
                *strides, src_batch, dst_batch, n, sources, targets, width, PRECISION=precision(), ROWS=64,
                COLS=64, DEPTH=32 if exact else 64, num_warps=8 if exact else 4)  # fmt: skip
    return best, similarity


def _noise_kind(noise: Tensor | None, temperature: float, shape: torch.Size, device: torch.device) -> int:
    """0 none, 1 drawn, 2 given."""
    if not temperature >= 0 or math.isinf(temperature):
        raise RuntimeError(f"temperature={temperature} must be finite, 0 or more")
    if noise is not None:
        check_rows("noise", noise, shape[0], tuple(shape[1:]), torch.float32, device)
        if noise.shape[0] != shape[0]:
            raise RuntimeError(f"noise must be {tuple(shape)}, got {tuple(noise.shape)}")
    return 0 if temperature == 0 else 1 if noise is None else 2


def _check_tokens(name: str, t: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if t.shape != shape or t.dtype != torch.int64 or not t.is_contiguous() or t.device != device:
        raise RuntimeError(f"{name} must be contiguous int64 {shape} on {device}, got {t.dtype} {tuple(t.shape)}")


def sample_logits(
    logits: Tensor, tokens: Tensor, step: Tensor, noise: Tensor | None, mask_id: int, seed: int, offset: int,
    temperature: float, flags: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if logits.dim() != 3 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not logits.shape[2]:
        raise RuntimeError(f"logits must be (B, N, V) of fp32, bf16 or fp16, got {logits.dtype} {tuple(logits.shape)}")
    batch, n, size = logits.shape
    if (size > 1 and logits.stride(2) != 1) or size >= 1 << 31:
        raise RuntimeError(f"logits must be contiguous in their last dim, got {logits.stride()}")
    _check_tokens("tokens", tokens, (batch, n), logits.device)
    kind = _noise_kind(noise, temperature, logits.shape, logits.device)
    if flags & SCALED and temperature == 0:
        raise RuntimeError("a temperature of 0 cannot scale the confidence")
    stream = random_stream(step, logits.device, seed, offset, PURPOSE_SAMPLE << 24)
    ids, confidence = tokens.new_empty(batch, n), logits.new_empty(batch, n, dtype=torch.float32)
    if ids.numel():
        from .triton_sample import sample_rows

        block = min(max(host.power_of_two(size), 32), 2048)
        host.launch(sample_rows, (batch * n,), logits, logits, tokens, noise if kind == 2 else None, ids, confidence,
                    *stream, mask_id, logits.stride(0), logits.stride(1), n, size, temperature,
                    1 / temperature if flags & SCALED else 1.0, KIND=flags & 3, NOISE=kind, BLOCK=block,
                    num_warps=max(block // 256, 1), enable_fp_fusion=False)  # fmt: skip
    return ids, confidence


def unmask_select(
    confidence: Tensor, sampled: Tensor, tokens: Tensor, step: Tensor, count: Tensor, groups: Tensor | None,
    hold: Tensor | None, noise: Tensor | None, mask_id: int, seed: int, offset: int, threshold: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    if confidence.dim() != 2 or confidence.dtype != torch.float32 or not confidence.is_contiguous():
        raise RuntimeError(f"confidence must be contiguous fp32 (B, N), got {confidence.dtype} "
                           f"{tuple(confidence.shape)}")  # fmt: skip
    (batch, n), device = confidence.shape, confidence.device
    for name, t in (("sampled", sampled), ("tokens", tokens)):
        _check_tokens(name, t, (batch, n), device)
    count_batch = check_ids("count", count, batch, device)
    if not count.shape[1] or n >= MAX_TOKENS:
        raise RuntimeError(f"count must have at least one group, N={n} be below {MAX_TOKENS}")
    groups_batch = 0 if groups is None else check_ids("groups", groups, batch, device, n)
    hold_batch = 0 if hold is None else check_rows("hold", hold, batch, (n,), torch.uint8, device)
    kind = _noise_kind(noise, temperature, confidence.shape, device)
    stream = random_stream(step, device, seed, offset, PURPOSE_SELECT << 24)
    out = tokens.new_empty(batch, n)
    if out.numel():
        from .triton_sample import open_keys, take_best

        keys, bits = tokens.new_empty(batch, n), (n - 1).bit_length()
        host.launch(open_keys, (math.ceil(n / KEYS), batch), confidence, confidence, tokens, groups, hold,
                    noise if kind == 2 else None, keys, *stream, mask_id, groups_batch, hold_batch, n, count.shape[1],
                    temperature, NOISE=kind, TOKEN_BITS=bits, BLOCK=KEYS, num_warps=4,
                    enable_fp_fusion=False)  # fmt: skip
        block, whole, warps = blocks_of(n)
        # without groups all candidates are of group 0: more programs would do its work again
        host.launch(take_best, (1 if groups is None else count.shape[1], batch), confidence, keys, groups, count,
                    confidence, sampled, tokens, out, groups_batch, count_batch, n, threshold, BLOCK=block, WHOLE=whole,
                    BITS=32 + bits, num_warps=warps)  # fmt: skip
    return out


KERNELS: dict[str, Callable] = {
    "match_tokens": match_tokens,
    "sample_logits": sample_logits,
    "unmask_select": unmask_select,
}
