"""`tile_attention` of the CPU kernels, forward, against the fp64 reference and beside torch's own attention."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import maskaccel.ops  # noqa: F401  (defines the ops and loads the library)
from maskaccel._native import native
from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import KEEP, PRUNE

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")

RAW = torch.ops.maskaccel_raw
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (16, 24, 40, 64, 72, 80, 128, 256)
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 300)
BLOCKS = ((64, 64), (16, 32), (128, 128), (48, 96), (32, 160))
OPTIONS = ("bias", "relpos_table", "relpos_q", "relpos_k", "reference_lse", "out_scale", "out_add")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def inputs(B, H, Hk, Sq, Sk, D, dtype=torch.float32, seed=0, layout="bshd"):
    """q, k, v in a layout: BSHD, views of BHSD, or slices of one wide row."""
    made = []
    for i, (length, heads) in enumerate(((Sq, H), (Sk, Hk), (Sk, Hk))):
        t = randn(B, length, heads, D, dtype=dtype, seed=seed + i)
        if layout == "bhsd":
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "fused":
            wide = torch.full((B, length, heads, 2 * D + 1), math.nan, dtype=dtype)
            wide[..., 1 : D + 1] = t
            t = wide[..., 1 : D + 1]
        made.append(t)
    return made


def arguments(q, k, v, mask=None, *, block=(64, 64), scale=None, threshold=0.0, flags=0, **options):
    lists, elements = (None,) * 6, (None, None)
    if mask is not None:
        block, elements = mask.block, (mask.pattern_of, mask.patterns)
        lists = (*mask.lists(), *mask.transposed_lists())
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q, k, v, *lists, *elements, *map(options.get, OPTIONS), *block, scale, threshold, flags)


def double(values):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]


def plain(args):
    """Torch's own attention in the dtype of q, then the epilogue in fp32."""
    (
        q,
        k,
        v,
        index,
        count,
        _,
        _,
        _,
        _,
        pattern_of,
        patterns,
        bias,
        table,
        at_q,
        at_k,
        _,
        gain,
        plus,
        bm,
        bn,
        scale,
        *_,
    ) = args
    tiles = reference._tiles_of(q, k, index, count, bm, bn)
    kept = reference.kept_elements(tiles, pattern_of, patterns, bm, bn, q.shape[1], k.shape[1])
    added = torch.zeros(kept.shape, dtype=q.dtype).masked_fill(~kept, -torch.inf)
    if bias is not None:
        added = added + bias.to(q.dtype)
    if table is not None:
        added = added + table.to(q.dtype)[:, (at_q[:, :, None] - at_k[:, None]).long()].transpose(0, 1)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    out = scaled_dot_product_attention(*heads, attn_mask=added, scale=scale, enable_gqa=True).transpose(1, 2)
    empty = torch.isneginf(added.expand(q.shape[0], q.shape[2], -1, -1)).all(-1).transpose(1, 2)[..., None]
    out = out.masked_fill(empty, 0.0).float()
    if gain is not None:
        out = out * gain.expand(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)[..., None]
    return (out if plus is None else out + plus).to(q.dtype)


def check(args, what=""):
    """The error rule for out, and lse to the rounding of its scores; returns the kernel's results."""
    out, lse, keep = RAW.tile_attention(*args)
    truth, true_lse, _ = reference.tile_attention(*double(args))
    assert out.is_contiguous() and out.dtype == args[0].dtype and lse.dtype == torch.float32
    assert_close_to_truth(out, plain(args), truth, what=what)
    empty = torch.isneginf(true_lse)
    assert torch.equal(torch.isneginf(lse), empty), what
    torch.testing.assert_close(
        lse.double().masked_fill(empty, 0), true_lse.masked_fill(empty, 0), rtol=2e-6, atol=4e-6, msg=what
    )
    return out, lse, keep


def random_mask(kind, batch, heads, Sq, Sk, block, seed):
    """Whole tiles, any elements, whole rows and a whole head left out, or everything."""
    if kind == "none":
        return None
    if kind == "tiles":
        shape = (batch, heads, -(-Sq // block[0]), -(-Sk // block[1]))
        return TileMask.from_tiles(rand(*shape, seed=seed) < 0.5, (Sq, Sk), block)
    kept = rand(batch, heads, Sq, Sk, seed=seed) < (0.5 if kind == "elements" else 0.05)
    if kind == "empty":
        kept[:, :, ::3] = False
        kept[:, -1] = False
    return TileMask.from_bool(kept, block)


# ------------------------------------------------------------------------------------------------ against fp64
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_head_dims_and_lengths(dtype):
    masks, groups = ("none", "tiles", "elements", "empty"), ((1, 1), (2, 1), (8, 1), (4, 2))
    for seed, (D, Sq) in enumerate(itertools.product(DIMS, LENGTHS)):
        H, Hk = groups[seed // 3 % 4]
        B, Sk = 1 + seed % 2, LENGTHS[(seed * 5 + D // 8) % len(LENGTHS)]
        layout, block = ("bshd", "bhsd", "fused")[seed % 3], BLOCKS[seed % len(BLOCKS)]
        q, k, v = inputs(B, H, Hk, Sq, Sk, D, dtype, 10 * seed, layout)
        mask = random_mask(masks[seed // 2 % 4], (1, B)[seed % 2], (1, H)[seed // 2 % 2], Sq, Sk, block, seed)
        check(arguments(q, k, v, mask, block=block), f"{D=} {Sq=} {Sk=} {H=} {Hk=} {layout} {mask}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_long(dtype):
    q, k, v = inputs(1, 2, 1, 1000, 1000, 72, dtype, layout="bhsd")
    for kind in ("none", "tiles", "elements"):
        check(arguments(q, k, v, random_mask(kind, 1, 2, 1000, 1000, (128, 64), 1)), kind)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_forward_random(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, block, seed = pick(*DTYPES), pick(*BLOCKS), data.draw(st.integers(0, 999))
    Hk, group, B, D = pick(1, 2), pick(1, 2, 8), pick(1, 2), pick(*DIMS)
    H = Hk * group
    Sq, Sk = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    q, k, v = inputs(B, H, Hk, Sq, Sk, D, dtype, seed, pick("bshd", "bhsd", "fused"))
    mask = random_mask(pick("none", "tiles", "elements", "empty"), pick(1, B), pick(1, H), Sq, Sk, block, seed)
    options = {}
    if pick(True, False):
        shape = [pick(1, n) for n in (B, H, Sq, Sk)]
        options["bias"] = randn(*shape, dtype=pick(dtype, torch.float32), seed=seed + 1)
        if pick(True, False):
            options["bias"] = options["bias"].mT.contiguous().mT
    if pick(True, False):
        options["relpos_table"] = randn(pick(1, H), Sq + Sk, seed=seed + 2)
        options["relpos_q"] = torch.randperm(Sq).to(torch.int32).expand(pick(1, B), Sq).contiguous() + Sk
        options["relpos_k"] = torch.arange(Sk, dtype=torch.int32).expand(pick(1, B), Sk).contiguous()
    if pick(True, False):
        options["out_scale"] = rand(pick(1, B), pick(1, H), pick(1, Sq), seed=seed)
    if pick(True, False):
        options["out_add"] = randn(B, Sq, H, D, dtype=pick(dtype, torch.float32), seed=seed + 3)
        if pick(True, False):
            options["out_add"] = options["out_add"].transpose(1, 2).contiguous().transpose(1, 2)
    check(arguments(q, k, v, mask, block=block, scale=pick(None, 0.4), **options), f"{seed=} {mask} {sorted(options)}")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_forward_scale_not_positive(scale):
    q, k, v = inputs(1, 2, 2, 70, 90, 32)
    check(arguments(q, k, v, random_mask("elements", 1, 2, 70, 90, (16, 32), 3), scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_rows_with_nothing(dtype):
    q, k, v = inputs(2, 2, 2, 100, 100, 40, dtype)
    kept = rand(2, 2, 100, 100, seed=5) < 0.3
    kept[:, 1] = False  # a head
    kept[0, 0, 64:] = False  # a whole row of tiles
    kept[1, 0, 3:7] = False
    mask = TileMask.from_bool(kept, (64, 64))
    empty = ~kept.any(-1)
    out, lse, _ = check(arguments(q, k, v, mask))
    assert torch.equal(torch.isneginf(lse), empty)
    rows = out.transpose(1, 2)
    assert not rows[empty].any() and rows[~empty].all(-1).any()
    plus = randn(2, 100, 2, 40, dtype=dtype, seed=9)
    out, _, _ = check(arguments(q, k, v, mask, out_scale=torch.full((1, 1, 1), 3.0), out_add=plus))
    assert torch.equal(out.transpose(1, 2)[empty], plus.transpose(1, 2)[empty])
    nothing = RAW.tile_attention(*arguments(q, k[:, :0], v[:, :0]))
    assert not nothing[0].any() and torch.isneginf(nothing[1]).all()
    assert RAW.tile_attention(*arguments(q[:, :0], k, v))[0].shape == (2, 0, 2, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_extreme_scores(dtype):
    """Maxima that rise and fall by thousands from tile to tile; -inf from a bias is an element left out."""
    q, k, v = inputs(1, 2, 2, 130, 260, 16, dtype)
    size = torch.tensor([1.0, 300.0, 0.01, 50.0, 200.0]).repeat_interleave(52).to(dtype)
    check(arguments(q, k * size[:, None, None], v), "rising")
    kept = rand(1, 2, 130, 260, seed=1) < 0.1
    kept[0, 0, 7] = False
    bias = torch.zeros(1, 2, 130, 260).masked_fill(~kept, -torch.inf)
    out, lse, _ = check(arguments(q, k, v, bias=bias))
    other, other_lse, _ = RAW.tile_attention(*arguments(q, k, v, TileMask.from_bool(kept, (64, 64))))
    torch.testing.assert_close(out, other)
    torch.testing.assert_close(lse, other_lse)


# ------------------------------------------------------------------------------------------------ equal bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_full_mask_is_no_mask(dtype):
    q, k, v = inputs(1, 2, 1, 300, 333, 72, dtype)
    dense = RAW.tile_attention(*arguments(q, k, v))
    for block in ((64, 64), (128, 128), (192, 64)):
        for mask in (
            TileMask.full((300, 333), block),
            TileMask.from_bool(torch.ones(300, 333, dtype=torch.bool), block),
        ):
            masked = RAW.tile_attention(*arguments(q, k, v, mask))
            assert all(torch.equal(a, b) for a, b in zip(dense, masked, strict=True)), block
    pruned = RAW.tile_attention(*arguments(q, k, v, block=(128, 128), threshold=-math.inf, flags=PRUNE))
    assert all(torch.equal(a, b) for a, b in zip(dense, pruned, strict=True))


def test_forward_threads_and_layouts_give_the_same_bits():
    made = [inputs(2, 4, 2, 150, 170, 40, torch.bfloat16, layout=name) for name in ("bshd", "bhsd", "fused")]
    mask = random_mask("elements", 2, 4, 150, 170, (16, 32), 2)
    threads = torch.get_num_threads()
    got = []
    try:
        for count, qkv in zip((1, 2, 5), made, strict=True):
            torch.set_num_threads(count)
            got.append(RAW.tile_attention(*arguments(*qkv, mask)))
    finally:
        torch.set_num_threads(threads)
    for other in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))


def test_forward_heads_in_groups():
    """More keys and values than are packed at once: the heads are those of one call each."""
    q, k, v = inputs(2, 10, 5, 80, 1000, 128)
    mask = random_mask("tiles", 2, 10, 80, 1000, (16, 64), 0)
    out, lse, _ = RAW.tile_attention(*arguments(q, k, v, mask))
    for b, h in ((0, 0), (0, 9), (1, 3)):
        one = TileMask.from_tiles(mask.tiles()[b : b + 1, h : h + 1], (80, 1000), (16, 64))
        key_head = slice(h // 2, h // 2 + 1)
        alone = arguments(q[b : b + 1, :, h : h + 1], k[b : b + 1, :, key_head], v[b : b + 1, :, key_head], one)
        single, single_lse, _ = RAW.tile_attention(*alone)
        assert torch.equal(single[0, :, 0], out[b, :, h]) and torch.equal(single_lse[0, 0], lse[b, h])


def test_forward_tiles_left_out_are_not_read():
    q, k, v = inputs(1, 1, 1, 128, 256, 64)
    tiles = torch.tensor([[True, False, True, False], [False, False, True, False]])
    k[:, 64:128], v[:, 192:] = math.nan, math.inf
    out, lse, _ = RAW.tile_attention(*arguments(q, k, v, TileMask.from_tiles(tiles, (128, 256), (64, 64))))
    assert out.isfinite().all() and lse.isfinite().all()


# ------------------------------------------------------------------------------------------------ keep bits
def keep_cases():
    for seed, block in enumerate(BLOCKS):
        dtype = DTYPES[seed % 3]
        q, k, v = inputs(1, 2, 2, 200, 340, 32, dtype, seed)
        size = (rand(340, seed=seed) * 3).to(dtype)  # keys that matter and keys that do not
        for kind in ("none", "tiles", "elements", "empty"):
            mask = random_mask(kind, 1, 2, 200, 340, block, seed)
            yield q, k * size[:, None, None], v, mask, block


@pytest.mark.parametrize("with_reference", [False, True])
def test_forward_keep_bits(with_reference):
    kept = {-3.0: 0, -1.0: 0, 0.5: 0}
    for q, k, v, mask, block in keep_cases():
        call: dict = {"block": block, "flags": KEEP}
        if with_reference:
            lse = reference.tile_attention(*double(arguments(q, k, v, mask, block=block)))[1]
            call["reference_lse"] = (lse + 0.5 * randn(*lse.shape)).float()
        for threshold in kept:
            got = RAW.tile_attention(*arguments(q, k, v, mask, threshold=threshold, **call))[2]
            # Scores are fp32: a tile within their rounding of the threshold may go either way.
            most, least = (
                reference.tile_attention(*double(arguments(q, k, v, mask, threshold=threshold + d, **call)))[2]
                for d in (-1e-5, 1e-5)
            )
            assert got.shape == most.shape and got.dtype == torch.int32
            assert not (got & ~most).any() and not (least & ~got).any(), (mask, threshold)
            kept[threshold] += int(reference.unpack_words(got, 32).sum())
    assert kept[-3.0] > kept[-1.0] > kept[0.5] > 0
    plain_out = RAW.tile_attention(*arguments(q, k, v, mask, block=block))
    with_bits = RAW.tile_attention(*arguments(q, k, v, mask, threshold=-1.0, **call))
    assert torch.equal(plain_out[0], with_bits[0]) and plain_out[2].numel() == 0


@pytest.mark.parametrize("with_reference", [False, True])
def test_forward_prune(with_reference):
    pruned = 0
    for q, k, v, mask, block in keep_cases():
        options = {}
        if with_reference:
            options["reference_lse"] = reference.tile_attention(*arguments(q, k, v, mask, block=block))[1]
        args = arguments(q, k, v, mask, block=block, threshold=-1.3, flags=PRUNE | KEEP, **options)
        out, lse, keep = RAW.tile_attention(*args)
        truth, true_lse, true_keep = reference.tile_attention(*double(args))
        assert torch.equal(keep, true_keep), mask
        left = TileMask(true_keep, block, (200, 340), *((mask.pattern_of, mask.patterns) if mask else ()))
        assert_close_to_truth(out, plain(arguments(q, k, v, left)), truth, what=f"{mask}")
        torch.testing.assert_close(lse.double(), true_lse, rtol=2e-6, atol=4e-6)
        pruned += left.density() < (1.0 if mask is None else mask.density())
        alone = RAW.tile_attention(*arguments(q, k, v, mask, block=block, threshold=-1.3, flags=PRUNE, **options))
        assert torch.equal(alone[0], out) and torch.equal(alone[1], lse) and alone[2].numel() == 0
    assert pruned > 5


# ------------------------------------------------------------------------------------------------ errors
def changed(args, **by_name):
    names = ("q", "k", "v", "index", "count", "order", "index_t", "count_t", "order_t", "pattern_of", "patterns")
    names += (*OPTIONS, "bm", "bn", "scale", "threshold", "flags")
    return [by_name.get(name, value) for name, value in zip(names, args, strict=True)]


def test_errors_name_the_argument():
    q, k, v = inputs(1, 4, 2, 100, 100, 32)
    good = arguments(q, k, v, random_mask("elements", 1, 1, 100, 100, (64, 64), 0))
    RAW.tile_attention(*good)
    i32 = torch.int32
    order, index, count = good[5], good[3], good[4]
    table = {"relpos_table": torch.zeros(1, 50), "relpos_q": torch.zeros(1, 100, dtype=i32)}
    bad = {
        r"q must be \(B, Sq, H, D\), got 3": {"q": q[0]},
        "multiples of 8 from 16 to 256": {"q": q[..., :8], "k": k[..., :8], "v": v[..., :8]},
        "k must have the dtype of q": {"k": k.half()},
        "v must have a contiguous last dim": {"v": v.transpose(1, 3).contiguous().transpose(1, 3)},
        "v must be": {"v": v[:, :50]},
        "multiple of the 3 heads of k": {"k": q[:, :, :3], "v": q[:, :, :3]},
        "q must be float32, bfloat16 or float16": {"q": q.double()},
        "bm is 24": {"bm": 24},
        "bn is 48": {"bn": 48},
        "must be given together": {"order": None},
        "count must be contiguous int32": {"count": count.long()},
        "count counts": {"count": count + 3},
        "index holds values from": {"index": index + 5},
        "order holds 0 twice": {"order": torch.zeros_like(order)},
        "pattern_of holds values": {"pattern_of": good[9] + 99},
        "patterns must be": {"patterns": good[10][:, :32].contiguous()},
        "bias has size 7 in dim 3": {"bias": torch.zeros(1, 1, 1, 7)},
        "bias must be float32 or have the dtype of q": {"bias": torch.zeros(1, 1, 1, 1, dtype=torch.float64)},
        "relpos_q - relpos_k goes from": {**table, "relpos_k": torch.ones(1, 100, dtype=i32)},
        "reference_lse must be": {"reference_lse": torch.zeros(1, 4, 99)},
        "reference_lse must be contiguous float32": {"reference_lse": torch.zeros(1, 4, 100).double()},
        "out_scale has size 2 in dim 1": {"out_scale": torch.zeros(1, 2, 1)},
        "out_scale must be float32": {"out_scale": torch.zeros(1, 1, 1, dtype=torch.float16)},
        "out_scale must be 3-D": {"out_scale": torch.zeros(1, 1)},
        "out_add must be float32 or have the dtype of q": {"out_add": q.half()},
        "out_add must be": {"out_add": q[:, :9]},
        "flags is 4": {"flags": 4},
        "skip_threshold must be a number": {"threshold": math.nan},
    }
    for message, arguments_ in bad.items():
        with pytest.raises(RuntimeError, match=message):
            RAW.tile_attention(*changed(good, **arguments_))


# ------------------------------------------------------------------------------------------------ instruction sets
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
LOWER = ISAS[: ISAS.index(native.isa)] if native.isa in ISAS else ()


@pytest.mark.skipif(not LOWER, reason="this machine has the portable kernels only")
@pytest.mark.parametrize("isa", LOWER)
def test_lower_instruction_sets(isa):
    here = Path(__file__)
    env = os.environ | {"MASKACCEL_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "forward", str(here)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert run.returncode == 0, run.stdout[-3000:]
