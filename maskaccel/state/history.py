"""The last computed values of one feature, raw."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import combine_history, combine_history_norm_modulate, gram, scatter_combine
from ..ops.steps.api import MAX_HISTORY

_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
_FP8_MAX = 448.0  # largest e4m3 value


@dataclass(frozen=True)
class Storage:
    """Where and how remembered features are kept.

    Attributes:
        dtype: None keeps the dtype of the feature; `"bf16"`, `"fp16"`, or `"fp8"` (e4m3 with a scale for each row).
        device: None keeps them where they are computed; `"cpu"` in (pinned) host memory.
        max_bytes: Bound of the bytes that one model's features may take; going beyond is an error that says how many
            are needed.
    """

    dtype: str | None = None
    device: str | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype={self.dtype!r}; allowed are None, 'bf16', 'fp16' and 'fp8'")
        if self.device not in (None, "cpu"):
            raise ValueError(f"device={self.device!r}; allowed are None (where the feature is) and 'cpu'")
        limit = self.max_bytes
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_bytes={limit!r} must be an integer, 1 or more, or None")


class History:
    """A ring of raw tensors with the steps at which they were computed.

    It copies what is pushed (so nothing it holds is aliased by a caller) into one preallocated buffer, and stores no
    derivatives: a forecast is a weighted sum of raw values. A push of another shape, dtype or device clears it first
    (so does one outside inference mode after one inside).

    Args:
        capacity: Values kept, 1 to 16.
        storage: Dtype and place of the buffer.
    """

    def __init__(self, capacity: int = 1, storage: Storage | None = None) -> None:
        if not 1 <= capacity <= MAX_HISTORY:
            raise ValueError(f"capacity={capacity} must be 1 to {MAX_HISTORY}")
        self.capacity, self.storage = capacity, storage or Storage()
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the buffer."""
        self._ring: Tensor | None = None
        self._scales: Tensor | None = None  # of the rows of an fp8 ring
        self._kind: tuple | None = None  # shape, dtype and device of the values
        self._stamps: list[float] = []  # newest first
        self._head = 0  # slot of the newest value
        self._gram: Tensor | None = None  # of the values held, once somebody asked

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def stamps(self) -> tuple[float, ...]:
        """Steps of the values, newest first."""
        return tuple(self._stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer: `capacity` values, from the first push on."""
        return sum(t.nbytes for t in (self._ring, self._scales) if t is not None)

    @property
    def width(self) -> int:
        """Channels of the values (their last dim); 0 before the first push."""
        return 0 if self._kind is None else int(self._kind[0][-1])

    def push(self, value: Tensor, stamp: float, base: Tensor | None = None) -> None:
        """Remember a copy of `value` (any shape), or of `value - base`, as of step `stamp`."""
        kind = (value.shape, value.dtype, value.device)
        ring = self._ring
        # A ring made in inference mode cannot be written to outside it.
        frozen = ring is not None and ring.is_inference() and not torch.is_inference_mode_enabled()
        if ring is None or frozen or kind != self._kind:
            self.clear()
            ring = self._ring = self._allocate(value)
            self._kind = kind
        self._keep(value, stamp, base)
        self._stamps = [stamp, *self._stamps][: self.capacity]
        self._gram = None

    def _keep(self, value: Tensor, stamp: float, base: Tensor | None) -> None:
        """Write a pushed value; the stamps are still those from before."""
        self._head = (self._head + 1) % self.capacity
        self._write(self._head, value, base)

    def _allocate(self, value: Tensor) -> Tensor:
        dtype = _DTYPES[self.storage.dtype] if value.is_floating_point() else None
        device = torch.device(self.storage.device or value.device)
        pinned = device.type == "cpu" and value.device.type == "cuda"
        options: dict[str, Any] = {"device": device, "pin_memory": pinned}
        if dtype is torch.float8_e4m3fn and value.dim() > 0:
            self._scales = torch.empty((self.capacity, *value.shape[:-1], 1), dtype=torch.float32, **options)
        else:
            dtype = value.dtype if dtype is torch.float8_e4m3fn else dtype
        return torch.empty((self.capacity, *value.shape), dtype=dtype or value.dtype, **options)

    def _write(self, number: int, value: Tensor, base: Tensor | None = None) -> None:
        """`value - base` into a slot."""
        assert self._ring is not None
        slot = self._ring[number]
        with torch.no_grad():
            if self._scales is not None:
                scale, narrow = _to_fp8(value if base is None else value - base)
                self._scales[number].copy_(scale, non_blocking=True)
                slot.copy_(narrow, non_blocking=True)
            elif base is None:
                slot.copy_(value, non_blocking=True)
            elif slot.dtype == value.dtype and slot.device == value.device:
                torch.sub(value, base, out=slot)
            else:
                slot.copy_(value - base, non_blocking=True)

    def _slots(self, slots: Sequence[int]) -> Tensor:
        """The values of these slots, stacked, where and as the feature was computed."""
        assert self._ring is not None and self._kind is not None
        _, dtype, device = self._kind
        in_order = list(slots) == list(range(self.capacity))
        ring = self._ring if in_order else self._ring[slots[0] : slots[0] + 1] if len(slots) == 1 else None
        if ring is None:
            ring = torch.stack([self._ring[slot] for slot in slots])
        if self._scales is None:
            # The combining kernel reads narrower floats than it writes, so only the device has to be right.
            return ring if ring.device == device else ring.to(device, non_blocking=True)
        scales = torch.stack([self._scales[slot] for slot in slots])
        wide = ring.to(device, non_blocking=True).float() * scales.to(device, non_blocking=True)
        return wide.to(dtype)

    def newest(self) -> Tensor:
        """The last value: a view of the buffer where that has the feature's dtype and device; not to be written to.

        Raises:
            LookupError: Nothing was pushed yet.
        """
        if self._ring is None or self._kind is None or not self._stamps:
            raise LookupError("the history is empty")
        return self._slots([self._head])[0].to(self._kind[1])

    def refresh(
        self,
        weights: Sequence[float] | Tensor,
        fresh: Tensor,
        index: Tensor,
        labels: Tensor | None = None,
        gamma: float = 0.0,
        *,
        x: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Write rows of the newest value, `(B, N, D)`, then `combine(weights, x, gate)`; the result is the caller's.

        Args:
            weights: As in `combine`.
            fresh: The rows, `(B, M, D)`.
            index: Which rows of each sample, int64 `(B, M)`; equal ones have equal values.
            labels: Cluster of every row, `(B, N)`, or None. With it every row that is not fresh, of a cluster with
                fresh ones, becomes `gamma * their mean + (1 - gamma) * row`.
            gamma: See `labels`.
            x: As in `combine`.
            gate: As in `combine`.
        """
        held = len(self._stamps)
        if self._ring is None or self._kind is None or len(self._kind[0]) != 3 or len(weights) != held:
            raise ValueError(f"{len(weights)} weights for {held} values, which must be (B, N, D)")
        if self._ring.is_inference() and not torch.is_inference_mode_enabled():
            self._ring = self._ring.clone()  # else it could not be written to
        ring, self._gram = self._ring, None
        if self._scales is not None or ring.device != self._kind[2]:
            value = self.newest().unsqueeze(0)
            one = on_device((1.0,), value.device)
            self._write(self._head, scatter_combine(value, one, fresh, index.int(), labels, gamma=gamma))
            return self.combine(weights, x=x, gate=gate)
        # The slots that are filled lie side by side, and those that are not hold garbage.
        slots = range(self.capacity) if held == self.capacity else range(self._head - held + 1, self._head + 1)
        values, newest = ring[slots.start : slots.stop], self._head - slots.start
        w = self._weights([weights[(self._head - slot) % self.capacity] for slot in slots])
        out = scatter_combine(values, w, fresh, index.int(), labels, gamma=gamma, x=x, gate=gate, newest=newest)
        return out.to(self._kind[1] if x is None else x.dtype)

    def gram(self) -> Tensor:
        """Inner products of all values held, newest first: fp64 `(held, held)` on the host.

        Read from the device once, and kept until the next push.

        Raises:
            LookupError: Nothing was pushed yet.
        """
        if self._ring is None or self._kind is None or not self._stamps:
            raise LookupError("the history is empty")
        if self._gram is None:
            newest_first = [(self._head - age) % self.capacity for age in range(len(self._stamps))]
            slots = sorted(newest_first)  # a full ring is read as it lies
            found = gram(self._slots(slots).reshape(len(slots), *_as_rows(self._kind[0]))).cpu()
            order = [slots.index(slot) for slot in newest_first]
            self._gram = found[order][:, order]
        return self._gram

    def combine(
        self, weights: Sequence[float] | Tensor, *, x: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """`x + gate * sum_k weights[k] * value_k`, newest first.

        Args:
            weights: One for each value held, or a tensor `(values held, D)` with one for each channel (last dim).
            x: Residual stream of the values' shape, or None.
            gate: Gate of `(B, N, D)` values, as `maskaccel.ops.combine_history` takes it.

        Raises:
            ValueError: Another number of weights than values.
        """
        ring, w = self._terms(weights)
        assert self._kind is not None
        shape, dtype, _ = self._kind
        like = None if x is None else x.reshape(ring.shape[1:])
        out = combine_history(ring, w, x=like, gate=gate)
        return out.reshape(shape).to(dtype if x is None else x.dtype)

    def combine_then_norm(
        self, weights: Sequence[float] | Tensor, x: Tensor, gate: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, **norm: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`combine` of `(B, N, D)` values, and `norm_modulate` of the result, in one pass.

        Args:
            weights: As in `combine`.
            x: See there.
            gate: See there.
            scale: As `maskaccel.ops.norm_modulate` takes it, like `shift` and `norm`.
            shift: See there.
            norm: Options of the norm.
        """
        ring, w = self._terms(weights)
        return combine_history_norm_modulate(ring, w, scale, shift, x=x, gate=gate, **norm)

    def of_kind(self, x: Tensor, any_width: bool = False) -> bool:
        """Whether the values have the shape (`any_width`: but for the last dim), dtype and device of x, `(B, N, D)`."""
        if x.dim() != 3 or self._kind is None or len(self._kind[0]) != 3:
            return False
        shape = (*x.shape[:2], self._kind[0][2] if any_width else x.shape[2])
        return self._kind == (shape, x.dtype, x.device)

    def _terms(self, weights: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """The values that count, `(K, B, N, D)`, and their weights, as the combining kernels take them."""
        held = len(self._stamps)
        if self._ring is None or self._kind is None or len(weights) != held:
            raise ValueError(f"{len(weights)} weights for {held} values")
        ages = {(self._head - age) % self.capacity: age for age in range(held)}
        # Unfilled slots hold garbage, which a zero weight would not silence if it is NaN; a host ring moves used slots.
        used = [slot for slot in sorted(ages) if _nonzero(weights[ages[slot]])] or [self._head]
        if held == self.capacity and len(used) == held:
            used = list(range(self.capacity))
        ring = self._slots(used).reshape(len(used), *_as_rows(self._kind[0]))
        return ring, self._weights([weights[ages[slot]] for slot in used])

    def _weights(self, weights: Sequence[Any]) -> Tensor:
        """Weights, each a number or one for each channel, where the values are combined."""
        assert self._kind is not None
        device = self._kind[2]
        if not isinstance(weights[0], Tensor):
            return on_device(tuple(float(w) for w in weights), device)
        return _moved(torch.stack(list(weights)).float(), device)


def _to_fp8(value: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the rows (fp32), and the rows over them (e4m3)."""
    wide = value.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _FP8_MAX
    return scale, (wide / scale).to(torch.float8_e4m3fn)


def _nonzero(weight: float | Tensor) -> bool:
    return bool(weight.any()) if isinstance(weight, Tensor) else weight != 0.0


def _as_rows(shape: torch.Size) -> tuple[int, int, int]:
    """The shape `(B, N, D)` that the combining kernel reads a value of any rank in."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) < 2:
        return 1, 1, shape.numel()
    middle = shape[1:-1].numel() if len(shape) > 2 else 1
    return shape[0], middle, shape[-1]


@functools.lru_cache(maxsize=512)
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small fp32 tensor, copied to a GPU without waiting for it; schedules repeat the same few weights."""
    return _moved(torch.tensor(values, dtype=torch.float32), device)


def _moved(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
