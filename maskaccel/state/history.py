"""The last computed values of one feature, raw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import combine_history
from ..ops.steps.api import MAX_HISTORY


class History:
    """A ring of raw tensors with the steps at which they were computed.

    It copies what is pushed (so nothing it holds is aliased by a caller) into one preallocated buffer, and stores no
    derivatives: a forecast is a weighted sum of raw values. A push of another shape, dtype or device clears it first
    (so does one outside inference mode after one inside).

    Args:
        capacity: Values kept, 1 to 16.
    """

    def __init__(self, capacity: int = 1) -> None:
        if not 1 <= capacity <= MAX_HISTORY:
            raise ValueError(f"capacity={capacity} must be 1 to {MAX_HISTORY}")
        self.capacity = capacity
        self._ring: Tensor | None = None
        self._stamps: list[float] = []  # newest first
        self._head = 0  # slot of the newest value

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def stamps(self) -> tuple[float, ...]:
        """Steps of the values, newest first."""
        return tuple(self._stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer: `capacity` values, from the first push on."""
        return 0 if self._ring is None else self._ring.nbytes

    def push(self, value: Tensor, stamp: float) -> None:
        """Remember a copy of `value` (any shape) as of step `stamp`."""
        ring = self._ring
        # A ring made in inference mode cannot be written to outside it.
        frozen = ring is not None and ring.is_inference() and not torch.is_inference_mode_enabled()
        if ring is None or frozen or not _alike(ring[0], value):
            self.clear()
            ring = self._ring = value.new_empty((self.capacity, *value.shape))
        self._head = (self._head + 1) % self.capacity
        with torch.no_grad():
            ring[self._head].copy_(value)
        self._stamps = [stamp, *self._stamps][: self.capacity]

    def newest(self) -> Tensor:
        """The last value: a view of the buffer, not to be written to.

        Raises:
            LookupError: Nothing was pushed yet.
        """
        if self._ring is None or not self._stamps:
            raise LookupError("the history is empty")
        return self._ring[self._head]

    def combine(self, weights: Sequence[float], *, x: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """`x + gate * sum_k weights[k] * value_k`, newest first; values are `(B, N, D)`.

        Raises:
            ValueError: Another number of weights than values.
        """
        if self._ring is None or len(weights) != len(self._stamps):
            raise ValueError(f"{len(weights)} weights for {len(self._stamps)} values")
        in_slots = [0.0] * self.capacity
        for age, weight in enumerate(weights):
            in_slots[(self._head - age) % self.capacity] = float(weight)
        held = len(self._stamps)
        ring = self._ring
        if held < self.capacity:  # unfilled slots hold garbage, which a zero weight would not silence if it is NaN
            slots = [(self._head - age) % self.capacity for age in range(held)]
            ring, in_slots = ring[slots], [float(weight) for weight in weights]
        return combine_history(ring, torch.tensor(in_slots, device=ring.device), x=x, gate=gate)

    def clear(self) -> None:
        """Forget everything and free the buffer."""
        self._ring, self._stamps, self._head = None, [], 0


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
