"""What a call of each CUDA op asks of the driver and of torch's allocator, counted on the host.

Each of them is host time before a kernel runs, and a launch is time on the device too.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _raw_cases import BARE, OPS, draw, draw_bare

from maskaccel.masks import TileMask
from maskaccel.ops.attention.schema import KEEP, packed
from maskaccel.ops.attention.serves import cuda_refusal

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "emulated"

# The most of any random call: launches, memsets, allocations (results that were asked for, and workspaces).
MOST = {
    "norm_modulate": (1, 0, 1),
    "norm_modulate_pair": (1, 0, 2),
    "norm_modulate_backward": (2, 0, 7),
    "gate_residual_norm_modulate": (1, 0, 2),
    "gate_residual_norm_modulate_pair": (1, 0, 3),
    "gate_residual_norm_modulate_backward": (2, 0, 10),
    "gate_residual": (1, 0, 1),
    "gate_residual_backward": (2, 0, 4),
    "qk_norm_rope": (1, 0, 2),
    "qk_norm_rope_backward": (2, 0, 7),
    "gated_activation": (1, 0, 1),
    "gated_activation_backward": (1, 0, 1),
    "relative_difference": (2, 0, 2),
    "combine_history": (1, 0, 1),
    "combine_sites": (1, 0, 1),
    "gram": (2, 0, 2),
    "combine_history_norm_modulate": (1, 0, 2),
    "norm_modulate_difference": (2, 0, 3),
    "scatter_combine": (3, 0, 4),
    "kmeans": (10, 0, 6),  # the rounds of these calls, two launches each
    "tile_attention": (1, 1, 3),
    "tile_attention_backward": (3, 1, 5),
    "attention_column_sums": (1, 0, 1),
    "merge_attention": (1, 0, 2),
    "merge_attention_backward": (1, 0, 4),
    "tile_lists": (2, 0, 4),
    "random_keep": (1, 0, 3),
    "select_active": (1, 0, 4),
    "gather_rows": (1, 0, 1),
    "unmerge_rows": (1, 0, 1),
    "segment_rows": (1, 0, 1),
    "scatter_merge": (1, 0, 1),
    "scatter_merge_backward": (3, 0, 5),
    "gather_modulate": (1, 0, 2),
    "write_kv_rows": (2, 1, 2),
    "read_kv_rows": (1, 0, 1),
    "match_tokens": (3, 0, 4),
    "sample_logits": (1, 0, 2),
    "unmask_select": (1, 0, 1),
}
TRITON_ALONE = {"linear_attention", "linear_attention_backward", "select_tiles", "tile_means"}


@pytest.fixture(scope="module")
def asked():
    """`asked(op, args)`: launches, memsets, attribute calls and allocations of a call that was made before."""
    cuda_emulator.load(FOLDER)
    library = ctypes.CDLL(str(cuda_emulator.build(FOLDER)))

    def so_far() -> list[int]:
        counts = (ctypes.c_long * 4)()
        library.maskaccel_emulated_counts(counts)
        return list(counts)

    def call(op: str, args: tuple) -> tuple[int, ...]:
        kernel = getattr(torch.ops.maskaccel_emulated, op)
        kernel(*args)
        before = so_far()
        kernel(*args)
        return tuple(now - then for then, now in zip(before, so_far(), strict=True))

    return call


def test_every_op_has_its_limit():
    assert set(MOST) == set(OPS) - TRITON_ALONE


@pytest.mark.parametrize("op", MOST)
def test_no_call_asks_for_more(asked, op):
    found = []
    for seed in range(4):
        args = draw(op, seed, (torch.bfloat16, torch.float16)[seed % 2])
        if op == "tile_attention" and cuda_refusal(args[0], args[-5], args[-1]) is not None:
            continue
        launches, memsets, attributes, allocations = asked(op, args)
        assert attributes == 0, "the shared memory of a kernel is asked for once"
        found.append((launches, memsets, allocations))
    assert found
    assert all(most <= limit for most, limit in zip(map(max, zip(*found, strict=True)), MOST[op], strict=True)), found


@pytest.mark.parametrize("name", BARE)
def test_the_common_calls_are_one_launch_and_their_results(asked, name):
    args, _ = draw_bare(name, 1, torch.bfloat16)
    out = getattr(torch.ops.maskaccel_emulated, name)(*args)
    results = sum(t.numel() > 0 for t in (out if isinstance(out, tuple) else (out,)))
    cleared = int("tested" in name and bool(args[-1] & KEEP))  # keep bits, which the kernel sets
    assert asked(name, args) == (1, cleared, 0, results)


def test_attention_of_hopper_clears_a_counter_in_graphs_alone(asked, monkeypatch):
    """Rows of tiles that differ in length are dealt out by a counter, which the kernel leaves at 0 as it found it."""
    monkeypatch.setenv("MASKACCEL_EMULATE_CAPABILITY", "90")
    monkeypatch.setenv("MASKACCEL_EMULATE_SHARED", str(227 * 1024))
    q = torch.randn(1, 384, 1, 64).bfloat16()  # more rows of tiles than the one CTA
    mask = TileMask.full((384, 384))
    lists, numbers = mask.lists(), packed(128, 128, 0.125)
    assert asked("tile_attention_bare", (q, q, q, None, None, None, None, None, numbers)) == (1, 0, 0, 2)
    masked = (q, q, q, *lists, None, None, numbers)
    expected = torch.ops.maskaccel_emulated.tile_attention_bare(*masked)[0]
    for _ in range(4):  # of the emulation's counters each one is used again
        assert asked("tile_attention_bare", masked) == (1, 0, 0, 2)
        assert torch.equal(torch.ops.maskaccel_emulated.tile_attention_bare(*masked)[0], expected)
    monkeypatch.setenv("MASKACCEL_EMULATE_CAPTURE", "1")
    assert asked("tile_attention_bare", masked) == (1, 1, 0, 3)
