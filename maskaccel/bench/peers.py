"""Other libraries' kernels for the same ops, timed where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .eager import Inputs
from .registry import Outputs


@dataclass(frozen=True)
class Peer:
    """A kernel of another library.

    Attributes:
        name: Shown in tables.
        module: Package it needs.
        run: The call on the inputs of the op.
    """

    name: str
    module: str
    run: Callable[[Inputs], Outputs]

    def reason(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if device.type != "cuda":
            return "its kernels run on GPUs"
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def _liger_swiglu(i: Inputs) -> Outputs:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    hidden, gate = i["x"].chunk(2, dim=-1)
    return (LigerSiLUMulFunction.apply(gate, hidden),)


PEERS: dict[str, tuple[Peer, ...]] = {
    "gated_activation.swiglu": (Peer("liger-kernel", "liger_kernel", _liger_swiglu),),
}
