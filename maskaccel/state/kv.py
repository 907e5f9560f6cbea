"""Keys and values of all tokens of a run, kept from the last dense step, with the rows of computed tokens renewed.

At a step in part the queries of the active tokens attend to the keys and values of all tokens: those of the active
ones are written over their rows, the others stay as they were. Nothing is joined or copied: what attention reads is the
memory itself, in the model's own order of tokens (text and latents as they stand in its joint sequence).

Keys are kept as they arrive at the attention function, after norms and rotary embedding: a token never changes its
place within a run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import read_kv_rows, write_kv_rows
from .generation import Generation

_MEMINFO = "/proc/meminfo"


@dataclass(frozen=True)
class KVStorage:
    """Which keys and values are kept, and how.

    Attributes:
        layers: Numbers of the layers whose attention sees all tokens; in the others active tokens see each other alone.
            None is all layers.
        fp8: Keep them as e4m3 with one scale for each row and head: half the bytes of bf16, one more pass to read them.
        offload: Keep them in (pinned) host memory; each layer is brought in as it is needed.
        max_bytes: Most bytes that one model may keep; None is what is free.
    """

    layers: tuple[int, ...] | None = None
    fp8: bool = False
    offload: bool = False
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        layers = self.layers
        if layers is not None and (
            not isinstance(layers, tuple) or not all(isinstance(n, int) and n >= 0 for n in layers)
        ):
            raise ValueError(f"layers={layers!r} must be a tuple of layer numbers, 0 or more, or None")
        for name in ("fp8", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        limit = self.max_bytes
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"max_bytes={limit!r} must be an integer, 1 or more, or None")


class KVMemoryError(MemoryError):
    """The keys and values of a run do not fit; nothing was allocated."""


@dataclass
class _Rows:
    """Keys and values of one attention, `(B, S, Hk, D)`."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None
    kind: tuple

    @property
    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, *(self.scales or ())]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class KVRows:
    """Keys and values of every attention of a model, for each guidance branch of a run.

    Allocated at the first dense step of a run and written in place from then on.

    Args:
        generation: The model's generation; what is kept is dropped when a run begins or ends.
        storage: How they are kept.
        sites: How many attentions keep them: what a branch will need is known at its first one.
    """

    def __init__(self, generation: Generation, storage: KVStorage, sites: int) -> None:
        self.generation, self.storage, self.sites = generation, storage, sites
        self._held: dict[str, dict[Hashable, _Rows]] = {}
        self._whole: dict[str, int] = {}  # branches of which every row was written in this run, and at which step
        generation.memories.append(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": {}, "_whole": {}}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(rows.nbytes for branch in self._held.values() for rows in branch.values())

    def clear(self) -> None:
        """Forget everything and free it."""
        self._held.clear()
        self._whole.clear()

    def complete(self, branch: str) -> bool:
        """Whether all rows of a branch have been written."""
        return branch in self._whole

    def begin(self, branch: str) -> None:
        """All rows of a branch are about to be written."""
        self._whole.pop(branch, None)

    def end(self, branch: str) -> None:
        """All rows of a branch have been written."""
        if self._held.get(branch):
            self._whole[branch] = self.generation.index

    def length(self, branch: str, key: Hashable) -> int | None:
        """Rows that are kept of one attention; None if it keeps none."""
        rows = self._held.get(branch, {}).get(key)
        return None if rows is None else rows.k.shape[1]

    @torch.no_grad()
    def fill(self, branch: str, key: Hashable, k: Tensor, v: Tensor) -> None:
        """Write all rows of one attention.

        Args:
            branch: Guidance branch.
            key: Which attention.
            k: Keys `(B, S, Hk, D)`.
            v: Values `(B, S, Hk, D)`.

        Raises:
            KVMemoryError: They do not fit.
            ValueError: Keys and values are of different shapes.
        """
        if k.shape != v.shape:
            raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)} must be of one shape to be kept")
        entry = self._entry(branch, key, k, k.shape[0], k.shape[1])
        if entry.scales is None:
            entry.k.copy_(k, non_blocking=True)
            entry.v.copy_(v, non_blocking=True)
        else:
            ids = torch.arange(k.shape[1], dtype=torch.int32, device=k.device)[None]
            self._write(entry, k, v, ids)

    @torch.no_grad()
    def prepare(self, branch: str, key: Hashable, like: Tensor, batch: int, rows: int) -> None:
        """Make room for one attention, with zeros in it, of the heads, dtype and device of `like`."""
        for t in self._entry(branch, key, like, batch, rows).tensors:
            t.zero_()

    @torch.no_grad()
    def write(self, branch: str, key: Hashable, k: Tensor, v: Tensor, ids: Tensor, sample: int | None = None) -> None:
        """Write some rows of one attention; see `renew`."""
        self._write(self._of(branch, key, sample), k, v, ids)

    @torch.no_grad()
    def renew(
        self, branch: str, key: Hashable, k: Tensor, v: Tensor, ids: Tensor, sample: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write some rows of one attention; all of them as attention reads them.

        Args:
            branch: Guidance branch.
            key: Which attention.
            k: Keys of the computed rows, `(B, M, Hk, D)`.
            v: Values of the computed rows, likewise.
            ids: int32 `(B|1, M)`: where they stand in the sequence; those out of it are written nowhere.
            sample: The one sample of the batch that this is of, where it is of one.

        Returns:
            Keys and values `(B, S, Hk, D)`: the memory itself, unless it is fp8 or in host memory. Not to be written
            to, and valid until the next call.
        """
        self.write(branch, key, k, v, ids, sample)
        full_k, full_v = self.read(branch, key, k, sample)
        if self.storage.fp8:
            write_kv_rows(k, v, full_k, full_v, ids)  # what is computed now is not rounded to fp8
        return full_k, full_v

    def read(self, branch: str, key: Hashable, like: Tensor, sample: int | None = None) -> tuple[Tensor, Tensor]:
        """All rows of one attention, of the dtype and on the device of `like`; not to be written to."""
        k, v, *scales = (t.to(like.device, non_blocking=True) for t in self._of(branch, key, sample).tensors)
        if not scales:
            return k, v
        return read_kv_rows(k, scales[0], like.dtype), read_kv_rows(v, scales[1], like.dtype)

    def _of(self, branch: str, key: Hashable, sample: int | None) -> _Rows:
        entry = self._held[branch][key]
        if sample is None:
            return entry
        k, v, *scales = (t[sample : sample + 1] for t in entry.tensors)
        return _Rows(k, v, (scales[0], scales[1]) if scales else None, entry.kind)

    def _entry(self, branch: str, key: Hashable, like: Tensor, batch: int, rows: int) -> _Rows:
        held = self._held.setdefault(branch, {})
        shape = (batch, rows, *like.shape[2:])
        kind = (shape, like.dtype, like.device)
        entry = held.get(key)
        if entry is None or entry.kind != kind or _frozen(entry.k):
            held.pop(key, None)
            entry = held[key] = self._allocate(like, shape, kind, len(held))
        return entry

    # -------------------------------------------------------------------------------------------------------- memory
    def _write(self, entry: _Rows, k: Tensor, v: Tensor, ids: Tensor) -> None:
        k, v, ids = (t.to(entry.k.device) for t in (k, v, ids))
        k_scale, v_scale = entry.scales or (None, None)
        write_kv_rows(k, v, entry.k, entry.v, ids, k_scale=k_scale, v_scale=v_scale)

    def _allocate(self, like: Tensor, shape: tuple[int, ...], kind: tuple, held: int) -> _Rows:
        storage = self.storage
        device = torch.device("cpu") if storage.offload else like.device
        heads = math.prod(shape[:-1])
        each = 2 * heads * (shape[-1] + 4 if storage.fp8 else shape[-1] * like.element_size())
        if held == 0:
            self._check(each, device)
        pinned = device.type == "cpu" and like.device.type == "cuda"
        dtype = torch.float8_e4m3fn if storage.fp8 else like.dtype
        made = [torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned) for _ in range(2)]
        scales = None
        if storage.fp8:
            scale = [torch.empty(shape[:-1], dtype=torch.float32, device=device, pin_memory=pinned) for _ in range(2)]
            scales = (scale[0], scale[1])
        return _Rows(made[0], made[1], scales, kind)

    def _check(self, each: int, device: torch.device) -> None:
        """KVMemoryError if a branch would not fit: before its first attention allocates anything."""
        need, storage = each * self.sites, self.storage
        free = free_bytes(device)
        limit = None if storage.max_bytes is None else storage.max_bytes - self.nbytes
        if limit is not None and need > limit:
            bound = f"max_bytes={storage.max_bytes} leaves {limit}"
        elif free is not None and need > free:
            bound = f"{free} are free on {device}"
        else:
            return
        ways = [f"layers= with fewer than {self.sites} layers"]
        ways += [] if storage.fp8 else ["fp8=True for half of the bytes of bf16"]
        ways += [] if storage.offload or device.type == "cpu" else ["offload=True for host memory"]
        raise KVMemoryError(
            f"keys and values of {self.sites} attentions take {need} bytes for one guidance branch, {bound}; use "
            f"KVStorage with {', or '.join(ways)}"
        )


def _frozen(t: Tensor) -> bool:
    """Whether a tensor made in inference mode cannot be written to now."""
    return t.is_inference() and not torch.is_inference_mode_enabled()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where nothing says it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        try:
            with open(_MEMINFO) as lines:
                found = next((line for line in lines if line.startswith("MemAvailable")), None)
        except OSError:
            return None
        return None if found is None else int(found.split()[1]) * 1024
    return None
