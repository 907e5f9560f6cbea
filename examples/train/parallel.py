"""One process or several: DDP, FSDP2, and states that are the same however many ranks wrote them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

KINDS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and the device that it uses."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and shows progress."""
        return self.rank == 0

    def total(self, *values: float | Tensor) -> list[float]:
        """The sum of each value over all ranks."""
        summed = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world > 1:
            dist.all_reduce(summed)
        return summed.tolist()


@contextlib.contextmanager
def ranks(device: str | None = None) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or this process alone.

    Args:
        device: `"cpu"` or `"cuda"`; None takes CUDA where there is any. Ranks talk by gloo or NCCL accordingly.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, torch.device(kind))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    began = not dist.is_initialized()  # a caller that trains several times has set up the group
    if began:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    finally:
        if began:
            dist.destroy_process_group()


def wrap(model: nn.Module, blocks: Iterable[nn.Module], kind: str, where: Ranks) -> nn.Module:
    """What to call in place of `model` so that gradients are averaged over the ranks.

    Args:
        model: All that is trained. Its parameters must all exist by now: patch before this.
        blocks: Its transformer blocks; FSDP2 gathers the parameters of one at a time.
        kind: `"ddp"` or `"fsdp"`.
        where: This process.

    Raises:
        ValueError: Another kind, or FSDP2 in a single process.
    """
    if kind not in KINDS:
        raise ValueError(f"parallel={kind!r}; allowed are {', '.join(KINDS)}")
    if where.world == 1:
        if kind == "fsdp":
            raise ValueError("parallel='fsdp' shards over several ranks, and this is one: start it with torchrun")
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in blocks:
        fully_shard(block)
    # The root, too, gives its gathered parameters back after every forward: an evaluation has no backward that would,
    # and the next forward would see the weights of the one before.
    return fully_shard(model, reshard_after_forward=True)


@contextlib.contextmanager
def synchronised(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Within it gradients are summed over ranks only if this is the `last` backward before the optimiser's step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(last)
    yield


def whole(tree: Any) -> Any:
    """A state with every shard replaced by the whole tensor, on the CPU; all ranks must call it."""
    return pytree.tree_map_only(Tensor, lambda tensor: unsharded(tensor).detach().cpu().clone(), tree)


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, a whole tensor, on the device of `tensor` and sharded as it is."""
    value = value.to(tensor.device, tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `whole(model.state_dict())` gave, sharded or not."""
    now = model.state_dict()
    if now.keys() != state.keys():
        raise ValueError(f"the checkpoint is of another model: {_difference(now.keys(), state.keys())}")
    model.load_state_dict({name: like(tensor, state[name]) for name, tensor in now.items()})


def _difference(have: Iterable[str], given: Iterable[str]) -> str:
    have, given = set(have), set(given)
    return f"it lacks {sorted(have - given)[:3]} and has {sorted(given - have)[:3]} beside"


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole(optimizer.state_dict())` gave: moments are sharded as their parameters are."""
    params: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: like(params[i], v) if isinstance(v, Tensor) and v.ndim else v for name, v in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
