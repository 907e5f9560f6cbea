"""That the emulation of sm_90a sees what could go wrong there: descriptors, bytes and barriers, one fault at a time.

A fault is of the emulated machine (`MASKACCEL_EMULATE_FAULT`), so that the kernel under test is the real one; it has to
end in a stop or a wrong result. The kernel as it is passes under random interleavings, where the emulation also checks
that barriers order all accesses to shared memory (`csrc/attention/cuda_sm90_order.h`).
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from pathlib import Path

import cuda_emulator
import pytest
import torch

from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import KEEP, NEED_K, NEED_Q, NEED_V, PRUNE

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "emulated"
WRONG = 3


def _run(dim: int, kind: str, messages: Path, environment: dict[str, str]) -> None:
    """Exits with 0 for the right result, WRONG for another; the emulation's stop is a SIGABRT, with a message."""
    os.environ.update(environment, MASKACCEL_EMULATE_CAPABILITY="90", MASKACCEL_EMULATE_MULTIPROCESSORS="2")
    faulthandler.disable()
    os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT), 2)
    gen = torch.Generator().manual_seed(dim)
    keys = 400 if kind == "backward" else 1000
    q, k, v = (torch.randn(1, s, 2, dim, generator=gen).half() for s in (270, keys, keys))
    kept = torch.rand(270, keys, generator=gen) < 0.5
    kept[:128, 128:384] = True
    mask = TileMask.from_bool(kept, (128, 128))
    args = (q, k, v, *mask.lists(), None, None, None, mask.pattern_of, mask.patterns, *(None,) * 7)
    args = (*args, 128, 128, dim**-0.5, 0.0, KEEP | PRUNE if kind == "pruned" else 0)
    name = "tile_attention"
    if kind == "backward":
        out, lse, _ = reference.tile_attention(*args)
        dout = torch.randn(out.shape, generator=gen).half()
        lists = (*mask.lists(), *mask.transposed_lists(), mask.pattern_of, mask.patterns)
        args = (dout, None, q, k, v, out, lse, *lists, *(None,) * 4, 128, 128, dim**-0.5, NEED_Q | NEED_K | NEED_V)
        name = "tile_attention_backward"
    got, want = (f(*args) for f in (getattr(torch.ops.maskaccel_emulated, name), getattr(reference, name)))
    count = 3 if kind == "backward" else 1
    right = all(torch.allclose(*pair, atol=5e-3, rtol=5e-3) for pair in zip(got[:count], want[:count], strict=True))
    os._exit(0 if right else WRONG)


@pytest.fixture
def outcome(tmp_path):
    """Exit code and last words of a call in a process of its own."""
    cuda_emulator.load(FOLDER)

    def outcome(dim: int, kind: str = "forward", **environment: str) -> tuple[int | None, str]:
        messages = tmp_path / "messages"
        child = multiprocessing.get_context("fork").Process(target=_run, args=(dim, kind, messages, environment))
        child.start()
        child.join()
        return child.exitcode, messages.read_text()

    return outcome


@pytest.mark.parametrize(
    ("dim", "kind"),
    [(64, "forward"), (80, "forward"), (96, "forward"), (256, "forward"), (64, "pruned"), (128, "pruned"),
     (64, "backward"), (128, "backward")],
)  # fmt: skip
def test_random_interleavings(outcome, dim, kind):
    """Warps and loads in random order."""
    for seed in range(int(os.environ.get("MASKACCEL_EMULATED_ORDERS", "2"))):
        assert outcome(dim, kind, MASKACCEL_EMULATE_ORDER="random", MASKACCEL_EMULATE_SEED=str(seed)) == (0, "")


@pytest.mark.parametrize(
    ("fault", "dim"),
    [
        ("tma-swizzle", 64),  # TMA writes with the next narrower swizzle
        ("tma-swizzle", 80),
        ("tma-swizzle", 96),
        ("wgmma-swizzle", 64),  # wgmma reads with the next narrower swizzle
        ("wgmma-swizzle", 96),
        ("wgmma-leading", 128),  # 16 bytes more from slab to slab of the values
        ("wgmma-leading", 80),
        ("wgmma-stride", 64),  # 16 bytes more from eight rows to the next
        ("wgmma-start", 64),  # the slices of K do not advance
    ],
)
def test_wrong_descriptors_are_seen(outcome, fault, dim):
    """Wrong results, or addresses where nothing was loaded."""
    code, message = outcome(dim, MASKACCEL_EMULATE_FAULT=fault)
    assert code == WRONG or (code == -signal.SIGABRT and "product" in message), message


@pytest.mark.parametrize(
    ("fault", "dim", "kind", "message"),
    [
        ("bytes-inside", 64, "forward", "deadlocked"),  # boxes at the edge count only the bytes inside of the tensor
        ("no-wait", 64, "forward", "a read of what nothing was written to"),  # mbarriers hold nobody
        # Operands are given away before products end.
        ("no-finish", 64, "forward", "a load of shared memory"),
        ("no-finish", 128, "backward", "the product that reads it"),
        # Lane 0 gives a card away while other lanes may still read it. Where consumers take turns, that holds it back.
        ("no-syncwarp", 256, "forward", "a write of shared memory"),
        ("no-syncwarp", 128, "backward", "a write of shared memory"),
        ("no-fence", 128, "backward", "the proxy fence of a write"),  # the score gradients' way to wgmma
        ("no-barrier", 128, "backward", "the proxy fence of a write"),  # nor do the consumers wait for each other
    ],
)
def test_missing_order_is_seen(outcome, fault, dim, kind, message):
    """The emulation stops and says which access is not ordered."""
    code, messages = outcome(dim, kind, MASKACCEL_EMULATE_FAULT=fault)
    assert code == -signal.SIGABRT
    assert message in messages
