"""Sampling of masked generative models: which masked tokens take their value at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _call, _checks
from . import _run
from .schema import CONFIDENCES, SCALED

ORDERS = ("confidence", "margin", "entropy", "scores")
_INF = math.inf


def confidence_unmask(
    logits: Tensor,
    tokens: Tensor,
    mask_id: int,
    n: int | Sequence[int] | Tensor | None = None,
    *,
    threshold: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    order: str = "confidence",
    scores: Tensor | None = None,
    scaled: bool = False,
    selection_temperature: float = 0.0,
    groups: Tensor | None = None,
    hold: Tensor | None = None,
    noise: Tensor | None = None,
    selection_noise: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token at every masked position, and let the most confident ones stay: one pass over the logits.

    The step of MaskGIT (Chang et al. 2022, arXiv 2202.04200, section 3.2) and of masked diffusion language models
    (LLaDA, Nie et al. 2025, arXiv 2502.09992, low-confidence remasking). A token is sampled by the Gumbel-max trick,
    `argmax(logits + temperature * g)`, whose law is `softmax(logits / temperature)`; noise comes from counters
    (`random_keep`), so a run repeats on every device up to the rounding of logarithms. Logits of positions that are
    not masked are never read.

    Args:
        logits: `(B, N, V)`, fp32, bf16 or fp16 (fp64 on the reference), last dim contiguous.
        tokens: int64 `(B, N)`.
        mask_id: Token of a masked position. It may be one of the V ids or lie outside them.
        n: Masked tokens to reveal in each sample: an int, `(B,)`, or with groups `(B, G)`. More than there are reveals
            all. None: 0, with a `threshold`.
        threshold: Reveal every masked token whose confidence is this or more too (Fast-dLLM).
        temperature: Of the sampled tokens; 0 takes the likeliest.
        seed: Of the noise, with `step` and `sample_offset` as in `random_keep`.
        step: As there.
        sample_offset: As there.
        order: What confidence is: `"confidence"`, the probability of the sampled token; `"margin"`, the largest
            probability minus the second; `"entropy"`, minus the entropy in nats; `"scores"`: given from outside.
        scores: `(B, N)` confidence for `order="scores"` (UNCAGE, learned policies).
        scaled: Confidence is under `softmax(logits / temperature)` in place of `softmax(logits)`.
        selection_temperature: Gumbel noise of this scale is added when tokens are compared: to the logarithm of the
            probability for `"confidence"` (MaskGIT), to the confidence itself for the others.
        groups: Integers `(N,)` or `(B, N)`: n is counted in each group 0, 1, ... by itself; others are not revealed
            (DUS's dilated groups, blocks).
        hold: Bool `(N,)` or `(B, N)`: positions that stay as they are (EditMGT).
        noise: fp32 `(B, N, V)` Gumbel noise in place of the counters' for sampling.
        selection_noise: fp32 `(B, N)`, the same for the comparison.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(tokens, confidence)`: int64 `(B, N)`, and fp32 `(B, N)`, +inf where a position was not masked.

    Raises:
        TypeError: Dtypes do not fit.
        ValueError: Shapes do not fit, numbers out of range, neither `n` nor `threshold` given, an input requires grad,
            or logits of a masked position hold a NaN, +inf, or -inf alone (read on a CPU only; elsewhere such a
            position stays masked with confidence NaN).
    """
    if (
        backend is None and order != "scores" and selection_temperature == 0.0 and not _call.tracing()
        and groups is hold is scores is noise is selection_noise is None
    ):  # fmt: skip
        try:
            most, least = _limits(n, threshold, logits.device)
            sampled, confidence = _sampled(
                logits, tokens, mask_id, temperature, CONFIDENCES[order], scaled, seed, step, sample_offset
            )
            args = (confidence, sampled, tokens, mask_id, most, least, 0.0, seed, step, sample_offset)
            return _revealed(*args), confidence
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    logits = _checks.activation("logits", logits, "B, N, V")
    _checks.choice("order", order, ORDERS)
    selection_temperature = _run.number("selection_temperature", selection_temperature, 0.0, 1e6)
    if (scores is None) == (order == "scores"):
        raise ValueError(f"order={order!r} {'needs' if scores is None else 'has no'} scores")
    if scores is not None:
        _checks.no_gradient("confidence_unmask", scores=scores)
        scores = _checks.floating("scores", scores)
        if tuple(scores.shape) != tuple(logits.shape[:2]):
            raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be {tuple(logits.shape[:2])}")
        _checks.same_device("scores", scores, "logits", logits)
    # What is wrong with the selection is told before anything runs.
    _selection(tokens, n, threshold, groups, hold, selection_noise, logits)
    # Noise is added to logarithms, which are formed before they are rounded to probabilities.
    logs = order == "confidence" and selection_temperature > 0
    sampled, confidence = sample_logits(
        logits, tokens, mask_id, temperature=temperature,
        confidence="log" if logs else "confidence" if order == "scores" else order, scaled=scaled,
        seed=seed, step=step, sample_offset=sample_offset, noise=noise, backend=backend,
    )  # fmt: skip
    compared = confidence if scores is None else torch.where(confidence.isnan(), confidence, scores.float())
    if logs and threshold is not None:
        threshold = math.log(threshold) if threshold > 0 else -_INF
    revealed = unmask_select(
        compared.float(), sampled, tokens, mask_id, n, threshold=threshold, temperature=selection_temperature,
        groups=groups, hold=hold, seed=seed, step=step, sample_offset=sample_offset, noise=selection_noise,
        backend=backend,
    )  # fmt: skip
    return revealed, confidence.exp() if logs else confidence


def sample_logits(
    logits: Tensor,
    tokens: Tensor,
    mask_id: int,
    *,
    temperature: float = 1.0,
    confidence: str = "confidence",
    scaled: bool = False,
    seed: int = 0,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of `confidence_unmask`: a token for every masked position, and its confidence.

    Args:
        logits: As there, like all arguments but this one:
        tokens: As there.
        mask_id: As there.
        temperature: As there.
        confidence: `"confidence"`, `"margin"`, `"entropy"`, or `"log"`, the logarithm of the probability.
        scaled: As there.
        seed: As there.
        step: As there.
        sample_offset: As there.
        noise: As there.
        backend: As there.

    Returns:
        int64 `(B, N)`, the token itself where nothing is masked, and fp32 `(B, N)` (fp64 for such logits), +inf there.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    if backend is None and noise is None and not _call.tracing():
        try:
            kind = CONFIDENCES[confidence]
            return _sampled(logits, tokens, mask_id, temperature, kind, scaled, seed, step, sample_offset)
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    logits = _checks.activation("logits", logits, "B, N, V")
    batch, count, size = logits.shape
    _tokens("tokens", tokens, (batch, count))
    _checks.same_device("tokens", tokens, "logits", logits)
    _checks.no_gradient("sample_logits", logits=logits)
    _run.integer("mask_id", mask_id, 0)
    _checks.choice("confidence", confidence, CONFIDENCES)
    temperature = _run.number("temperature", temperature, 0.0, 1e6)
    if scaled and temperature == 0:
        raise ValueError("scaled=True needs a temperature above 0")
    device = logits.device
    _noise("noise", noise, (batch, count, size), device)
    at, key = _run.step_tensor(step, device), _run.seed_of(seed)
    _run.integer("sample_offset", sample_offset, 0)
    kind = CONFIDENCES[confidence] | (SCALED if scaled else 0)
    args = (
        _checks.dense_last(logits), tokens.contiguous(), at, noise, mask_id, key, sample_offset, temperature, kind
    )  # fmt: skip
    sampled, found = _run.run("sample_logits", args, device, backend, logits.dtype)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _refuse_nan(found)
    return sampled, found


def _refuse_nan(found: Tensor) -> None:
    if not found.numel() or not math.isnan(found.min()):  # one NaN makes the least of all one
        return
    sample, row = map(int, found.isnan().nonzero()[0])
    raise ValueError(f"logits of token {row} of sample {sample} hold a NaN, +inf, or nothing but -inf")


def _whole(a: object, b: object, c: object) -> bool:
    """Plain integers of 0 or more."""
    return type(a) is type(b) is type(c) is int and min(a, b, c) >= 0 and max(a, b, c) < 1 << 63


def _scale(temperature: object) -> bool:
    return (type(temperature) is float or type(temperature) is int) and 0.0 <= temperature <= 1e6


def _limits(n: int | Sequence[int] | Tensor | None, threshold: float | None, device: torch.device) -> tuple:
    """Counts and the threshold as the kernel takes them; LookupError for what has to be looked at."""
    if threshold is not None and (type(threshold) not in (float, int) or math.isnan(threshold)):
        raise LookupError
    if n is None and threshold is not None:
        n = 0
    if type(n) is int and n >= 0:
        n = _run.constant(n, (1, 1), torch.int32, device)
    elif not isinstance(n, Tensor) or n.dtype is not torch.int32 or (n.is_cpu and n.numel() and n.min() < 0):
        raise LookupError  # only a CPU can look at values without waiting
    return n, _INF if threshold is None else float(threshold)


def _sampled(
    logits: Tensor, tokens: Tensor, mask_id: int, temperature: float, kind: int, scaled: bool, seed: int,
    step: int | Tensor, sample_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sample_logits` checked by the kernel, for plain numbers in their range."""
    if not (_whole(mask_id, seed, sample_offset) and _scale(temperature)) or (scaled and temperature == 0):
        raise LookupError
    if logits.requires_grad and torch.is_grad_enabled():
        raise LookupError
    at = step if isinstance(step, Tensor) else _run.step_tensor(step, logits.device)
    kind |= SCALED if scaled else 0
    args = (logits, tokens, at, None, mask_id, seed, sample_offset, temperature, kind)
    sampled, found = _call.undifferentiated("sample_logits", logits, args)
    if logits.is_cpu:
        _refuse_nan(found)
    return sampled, found


def _revealed(
    confidence: Tensor, sampled: Tensor, tokens: Tensor, mask_id: int, most: Tensor, least: float, temperature: float,
    seed: int, step: int | Tensor, sample_offset: int,
) -> Tensor:  # fmt: skip
    """`unmask_select` in the same way."""
    if not (_whole(mask_id, seed, sample_offset) and _scale(temperature)):
        raise LookupError
    if confidence.requires_grad and torch.is_grad_enabled():
        raise LookupError
    at = step if isinstance(step, Tensor) else _run.step_tensor(step, confidence.device)
    args = (confidence, sampled, tokens, at, most, None, None, None, mask_id, seed, sample_offset, least, temperature)
    return _call.undifferentiated("unmask_select", confidence, args)  # type: ignore[no-any-return]


def unmask_select(
    confidence: Tensor,
    sampled: Tensor,
    tokens: Tensor,
    mask_id: int,
    n: int | Sequence[int] | Tensor | None = None,
    *,
    threshold: float | None = None,
    temperature: float = 0.0,
    groups: Tensor | None = None,
    hold: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    sample_offset: int = 0,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second half of `confidence_unmask`: which masked positions take their sampled token.

    Args:
        confidence: fp32 `(B, N)`: what positions are compared by. A NaN is never revealed.
        sampled: int64 `(B, N)`: the token of each.
        tokens: As there, like all arguments from here on.
        mask_id: As there.
        n: As there.
        threshold: As there.
        temperature: `selection_temperature` there, always of the confidence itself.
        groups: As there.
        hold: As there.
        seed: As there.
        step: As there.
        sample_offset: As there.
        noise: `selection_noise` there.
        backend: As there.

    Returns:
        int64 `(B, N)`.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    if backend is None and groups is hold is noise is None and not _call.tracing():
        try:
            most, least = _limits(n, threshold, confidence.device)
            args: tuple = (confidence, sampled, tokens, mask_id, most, least, temperature, seed, step, sample_offset)
            return _revealed(*args)
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    confidence = _checks.tensor("confidence", confidence)
    if confidence.dtype != torch.float32 or confidence.dim() != 2:
        raise ValueError(f"confidence is {confidence.dtype} {tuple(confidence.shape)}; it must be float32 (B, N)")
    _checks.no_gradient("unmask_select", confidence=confidence)
    limits, group, held = _selection(tokens, n, threshold, groups, hold, noise, confidence)
    _tokens("sampled", sampled, tuple(confidence.shape))
    for name, t in (("tokens", tokens), ("sampled", sampled)):
        _checks.same_device(name, t, "confidence", confidence)
    _run.integer("mask_id", mask_id, 0)
    temperature = _run.number("temperature", temperature, 0.0, 1e6)
    device = confidence.device
    at, key = _run.step_tensor(step, device), _run.seed_of(seed)
    _run.integer("sample_offset", sample_offset, 0)
    least = _INF if threshold is None else float(threshold)
    args = (confidence.contiguous(), sampled.contiguous(), tokens.contiguous(), at, limits, group, held, noise, mask_id,
            key, sample_offset, least, temperature)  # fmt: skip
    revealed: Tensor = _run.run("unmask_select", args, device, backend)
    return revealed


def _tokens(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    t = _checks.tensor(name, t)
    if t.dtype != torch.int64 or tuple(t.shape) != shape:
        raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}; it must be int64 {shape}")


def _selection(
    tokens: Tensor, n: int | Sequence[int] | Tensor | None, threshold: float | None, groups: Tensor | None,
    hold: Tensor | None, noise: Tensor | None, like: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """What a selection is limited by: counts `(B|1, G)`, groups and held positions, for a batch like that of `like`."""
    batch, count = like.shape[:2]
    device = like.device
    _tokens("tokens", tokens, (batch, count))
    if n is None and threshold is None:
        raise ValueError("n or threshold must say how many tokens are revealed")
    if threshold is not None and (not isinstance(threshold, int | float) or math.isnan(threshold)):
        raise ValueError(f"threshold={threshold!r} must be a number")
    group = None if groups is None else _run.rows_of("groups", groups, batch, count, device)
    held = _run.flags_of("hold", hold, batch, count, device)
    limits = _counts(0 if n is None else n, batch, group is not None, device)
    _noise("noise" if like.dim() == 2 else "selection_noise", noise, (batch, count), device)
    return limits, group, held


def _counts(n: int | Sequence[int] | Tensor, batch: int, grouped: bool, device: torch.device) -> Tensor:
    """Tokens to reveal, int32 `(B|1, G)`."""
    if isinstance(n, Tensor):
        if n.dtype not in (torch.int32, torch.int64) or n.dim() > 2:
            raise TypeError(f"n is {n.dtype} {tuple(n.shape)}; it must be integers (B,) or (B, G)")
        counts = n.reshape(1, 1) if n.dim() == 0 else n[:, None] if n.dim() == 1 else n
        _run.same_place("n", n, device)
    elif isinstance(n, Sequence):
        counts = torch.tensor(list(n))
        counts = counts[:, None] if counts.dim() == 1 else counts
        if counts.dtype != torch.int64:
            raise TypeError(f"n={n!r} must be integers")
    else:
        counts = _run.constant(_run.integer("n", n, 0), (1, 1), torch.int32, device)
    if counts.dim() != 2 or counts.shape[0] not in (1, batch) or (not grouped and counts.shape[1] != 1):
        forms = f"an int, ({batch},)" + (f" or ({batch}, G)" if grouped else "")
        raise ValueError(f"n has shape {tuple(counts.shape)}; it must be {forms}")
    if counts.device.type == "cpu" and not torch.compiler.is_compiling() and counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"n holds {int(counts.min())}; it must be 0 or more")
    return counts.to(device=device, dtype=torch.int32).contiguous()


def _noise(name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if t is None:
        return
    t = _checks.tensor(name, t)
    if t.dtype != torch.float32 or tuple(t.shape) != shape:
        raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}; it must be float32 {shape}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    _run.same_place(name, t, device)
