"""Lists of tiles, merging of partial attention results, linear attention: kernels and reference against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _numerics import assert_all_close_to_truth, assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel._native import native
from maskaccel.masks import GridWindow, TileMask, TokenOrder
from maskaccel.ops._backends import namespace, refusal
from maskaccel.ops._registry import SPECS, op
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import MASS, SCHEMAS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
SMALL = (
    "tile_lists", "merge_attention", "merge_attention_backward", "linear_attention", "linear_attention_backward",
)  # fmt: skip
BACKENDS = [
    *(b for b in ("cpu", "triton") if all(refusal(b, CPU, torch.float32, name) is None for name in SMALL)),
    "reference",
]
INTERPRETED = "triton" in BACKENDS
fuzz = settings(max_examples=10 if INTERPRETED else 60, deadline=None, derandomize=True)
seeds = st.integers(0, 999)


def kernel(backend: str, name: str):
    """The raw op of a backend."""
    return reference.KERNELS[name] if backend == "reference" else op(namespace(backend), name)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def strided(x: torch.Tensor, form: str) -> torch.Tensor:
    """The same values in another layout with a dense last dim; what lies between them is NaN."""
    if form == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "fused":
        wide = torch.full((*x.shape[:3], 2, x.shape[3]), float("nan"), dtype=x.dtype)
        wide[..., 1, :] = x
        return wide[..., 1, :]
    return x


forms = st.sampled_from(["dense", "heads first", "fused"])


# ------------------------------------------------------------------------------------------------------- tile_lists
def _lists(kept: torch.Tensor, partial: torch.Tensor) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """The lists of (slabs, rows, tiles) by the words of the schema."""
    rows, counts, slabs = [], [], []
    for at, (slab, part) in enumerate(zip(kept.tolist(), partial.tolist(), strict=True)):
        for row, cut in zip(slab, part, strict=True):
            first = [n for n, have in enumerate(row) if have and cut[n]]
            rows.append(first + [n for n, have in enumerate(row) if have and not cut[n]])
            counts.append([len(first), len(rows[-1]) - len(first)])
            slabs.append(at)
    order = sorted(range(len(rows)), key=lambda r: (-len(rows[r]).bit_length(), slabs[r], -len(rows[r]), r))
    return rows, counts, order


@pytest.mark.parametrize("backend", BACKENDS)
@fuzz
@given(
    seeds, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, 5, 31, 33, 70]),
    st.sampled_from([1, 3, 32, 33, 64, 100]), st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([None, "each", "all", "heads"]), st.booleans(),
)  # fmt: skip
def test_tile_lists(backend, seed, batch, heads, rows, tiles, density, pattern, transpose):
    if INTERPRETED:
        rows, tiles = rows % 40, tiles % 40 + 1
    g = generator(seed)
    kept = torch.rand(batch, heads, rows, tiles, generator=g) < density
    bits = reference.pack_words(kept)
    noise = torch.randint(-(2**31), 2**31, bits.shape, generator=g).to(torch.int32)
    bits = bits | (noise & ~reference.pack_words(torch.ones_like(kept)))  # what lies past the tiles is ignored
    pattern_of = None
    if pattern is not None:
        lead = {"each": (batch, heads), "all": (1, 1), "heads": (1, heads)}[pattern]
        pattern_of = torch.randint(-2, 3, (*lead, rows, tiles), generator=g, dtype=torch.int32).clamp(min=-1)
    partial = kept & (torch.zeros_like(kept) if pattern_of is None else pattern_of >= 0)
    index, count, order = kernel(backend, "tile_lists")(bits, pattern_of, tiles, transpose)
    if transpose:
        kept, partial = kept.mT, partial.mT
    lists, counts, by_length = _lists(kept.flatten(0, 1), partial.flatten(0, 1))
    assert {t.dtype for t in (index, count, order)} == {torch.int32}
    assert index.shape == kept.shape
    assert count.shape == (*kept.shape[:3], 2)
    assert [row[: sum(n)] for row, n in zip(index.flatten(0, 2).tolist(), counts, strict=True)] == lists
    assert count.flatten(0, 2).tolist() == counts
    assert order.tolist() == by_length


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0].float(), *a[1:]), "bits"),
        (lambda a: (a[0][0], *a[1:]), "bits"),
        (lambda a: (a[0].mT, *a[1:]), "bits"),
        (lambda a: (*a[:2], 99, False), "bits"),
        (lambda a: (*a[:2], -1, False), "tiles"),
        (lambda a: (a[0], a[1].long(), *a[2:]), "pattern_of"),
        (lambda a: (a[0], a[1][..., 1:].contiguous(), *a[2:]), "pattern_of"),
        (lambda a: (a[0], a[1].expand(3, -1, -1, -1).contiguous(), *a[2:]), "pattern_of"),
    ],
)
def test_tile_lists_refuses(backend, change, message):
    args = (torch.zeros(2, 2, 40, 2, dtype=torch.int32), torch.zeros(1, 2, 40, 40, dtype=torch.int32), 40, False)
    with pytest.raises(RuntimeError, match=message):
        kernel(backend, "tile_lists")(*change(args))


# -------------------------------------------------------------------------------------------------- merge_attention
def _merge_case(seed, shape, dtype, form, empty):
    batch, tokens, heads, _ = shape
    g = generator(seed)
    out = [torch.randn(shape, generator=g).to(dtype) for _ in range(2)]
    lse = [torch.randn(batch, heads, tokens, generator=g) * 4 for _ in range(2)]
    if empty:
        nothing = torch.rand(2, batch, heads, tokens, generator=g) < 0.3
        for i in range(2):
            lse[i] = lse[i].masked_fill(nothing[i], -torch.inf)
            out[i] = out[i].masked_fill(nothing[i].transpose(1, 2)[..., None], torch.nan)
    return strided(out[0], form), lse[0], strided(out[1], form), lse[1]


def _merged(out1, lse1, out2, lse2):
    """By exponentials in fp64, without a guard; rows without keys are put right afterwards."""
    w1, w2 = (lse.double().exp() for lse in (lse1, lse2))
    total = w1 + w2
    rows = [
        torch.where(w[..., None] > 0, o.double().transpose(1, 2) * w[..., None], 0.0)
        for o, w in ((out1, w1), (out2, w2))
    ]
    mean = torch.where(total[..., None] > 0, sum(rows) / total[..., None], 0.0)
    return mean.transpose(1, 2), total.log()


@pytest.mark.parametrize("backend", BACKENDS)
@fuzz
@given(
    seeds, st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 3), st.sampled_from([16, 24, 72, 128])),
    st.sampled_from(DTYPES), forms, st.booleans(), st.booleans(),
)  # fmt: skip
def test_merge_attention(backend, seed, shape, dtype, form, empty, with_dlse):
    args = _merge_case(seed, shape, dtype, form, empty)
    got = kernel(backend, "merge_attention")(*args)
    assert_all_close_to_truth(got, reference.merge_attention(*args), _merged(*args), "merge")
    g = generator(seed + 1)
    dout = strided(torch.randn(shape, generator=g).to(dtype), form)
    dlse = torch.randn(args[1].shape, generator=g) if with_dlse else None
    got = kernel(backend, "merge_attention_backward")(dout, dlse, *args)
    plain = reference.merge_attention_backward(dout, dlse, *args)
    wide = [t if t is None else t.double() for t in (dout, dlse, *args)]
    truth = reference.merge_attention_backward(*wide)
    assert_all_close_to_truth(got[::2], plain[::2], truth[::2], "d out")
    # The gradients of lse are sums whose terms may cancel.
    terms = wide[0].abs() * sum(t.nan_to_num().abs() for t in (wide[2], wide[4]))
    size = terms.sum(-1).max().item() + (0.0 if dlse is None else dlse.abs().max().item()) if dout.numel() else 0.0
    for i in (1, 3):
        assert_close_to_truth(got[i], plain[i], truth[i], what=f"d lse{i // 2 + 1}", magnitude=size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_attention_of_halves_is_attention(backend):
    """Also its gradients, which go through both lse."""
    g = generator(0)
    q, k, v, dout = (torch.randn(2, 20, 2, 16, generator=g) for _ in range(4))

    def attention(q, k, v):
        s = q.transpose(1, 2) @ k.transpose(1, 2).mT / 4
        return (s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), s.logsumexp(-1)

    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    parts = [attention(inputs[0], inputs[1][:, half], inputs[2][:, half]) for half in (slice(8), slice(8, None))]
    out, lse = ops.merge_attention(*parts[0], *parts[1], backend=backend)
    want, want_lse = attention(q, k, v)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    got = torch.autograd.grad((out * dout).sum() + (lse * lse).sum(), inputs)
    again = [t.clone().requires_grad_() for t in (q, k, v)]
    want, want_lse = attention(*again)
    grads = torch.autograd.grad((want * dout).sum() + (want_lse * want_lse).sum(), again)
    torch.testing.assert_close(got, grads, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys(backend):
    """A part without keys changes nothing, bit by bit, whatever it holds; two such parts are nothing."""
    out, lse = torch.randn(1, 4, 2, 16, generator=generator(0)), torch.randn(1, 2, 4, generator=generator(1))
    nan, never = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    inputs = [t.clone().requires_grad_() for t in (out, lse, nan, never)]
    for args in ((*inputs[:2], *inputs[2:]), (*inputs[2:], *inputs[:2])):
        merged, total = ops.merge_attention(*args, backend=backend)
        assert torch.equal(merged, out)
        assert torch.equal(total, lse)
        d_out, d_lse, d_nan, d_never = torch.autograd.grad(merged.sum() + 3 * total.sum(), inputs)
        assert torch.equal(d_out, torch.ones_like(out))
        assert torch.equal(d_lse, torch.full_like(lse, 3.0))
        assert not d_nan.any()
        assert not d_never.any()
    merged, total = ops.merge_attention(nan, never, nan, never, backend=backend)
    assert torch.equal(merged, torch.zeros_like(out))
    assert torch.equal(total, never)


def test_merge_attention_gradcheck():
    g = generator(2)
    out = [torch.randn(1, 3, 2, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lse = [torch.randn(1, 2, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    args = (out[0], lse[0], out[1], lse[1])
    assert torch.autograd.gradcheck(lambda *a: ops.merge_attention(*a, backend="reference"), args)
    merged, total = reference.merge_attention(*args)
    dout, dlse = torch.randn(merged.shape, generator=g).double(), torch.randn(total.shape, generator=g).double()
    want = torch.autograd.grad((merged, total), args, (dout, dlse))
    torch.testing.assert_close(reference.merge_attention_backward(dout, dlse, *args), want)


def test_merge_attention_refuses():
    out, lse = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="lse2 has shape"):
        ops.merge_attention(out, lse, out, lse.mT)
    with pytest.raises(TypeError, match="lse1 has dtype"):
        ops.merge_attention(out, lse.half(), out, lse)
    with pytest.raises(TypeError, match="lse2 must be"):
        ops.merge_attention(out, lse, out, None)
    with pytest.raises((TypeError, ValueError), match="out2"):
        ops.merge_attention(out, lse, out.half(), lse)
    for backend in BACKENDS[:-1]:
        merge = kernel(backend, "merge_attention")
        for args in ((out, lse, out[:, 1:], lse), (out, lse.double(), out, lse), (out, lse, out.half(), lse),
                     (out[0], lse, out, lse), (out, lse, out.mT, lse), (out, lse[:, 1:], out, lse)):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"out1|out2|lse1"):
                merge(*args)


# ------------------------------------------------------------------------------------------------- linear_attention
def _linear_truth(q, k, v, feature_map, normalize, eps):
    """By the attention matrix, fp64; differentiable."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    phi = torch.relu if feature_map == 0 else lambda x: torch.where(x > 0, x + 1, x.exp())
    weights = phi(q) @ phi(k).mT / (k.shape[2] if normalize else 1)
    return (weights @ v / (weights.sum(-1, keepdim=True) + eps)).transpose(1, 2)


LINEAR_SHAPES = [
    (1, 3, 2, 1, 1, 16), (2, 70, 33, 4, 2, 24), (1, 65, 700, 3, 3, 40), (1, 9, 130, 2, 1, 72), (1, 128, 64, 2, 2, 128),
    (1, 5, 70, 2, 2, 256), (0, 4, 4, 2, 2, 16), (2, 0, 5, 2, 1, 16),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@fuzz
@given(
    seeds, st.sampled_from(LINEAR_SHAPES[:4] if INTERPRETED else LINEAR_SHAPES), st.sampled_from(DTYPES), forms,
    st.integers(0, 1), st.integers(0, 1), st.sampled_from([1e-6, 1e-4, 0.5]),
)  # fmt: skip
def test_linear_attention(backend, seed, shape, dtype, form, feature_map, normalize, eps):
    batch, sq, sk, heads, kv_heads, width = shape
    g = generator(seed)
    q, k, v, dout = (
        strided(torch.randn(batch, tokens, count, width, generator=g).to(dtype), form)
        for tokens, count in ((sq, heads), (sk, kv_heads), (sk, kv_heads), (sq, heads))
    )
    options = (feature_map, normalize, eps)
    got = kernel(backend, "linear_attention")(q, k, v, *options)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    truth = _linear_truth(*inputs, *options)
    plain = reference.linear_attention(q, k, v, *options)
    assert_all_close_to_truth([got], [plain], [truth.detach()], "linear")
    got = kernel(backend, "linear_attention_backward")(dout, q, k, v, *options)
    grads = torch.autograd.grad(truth, inputs, dout.double())
    plain = reference.linear_attention_backward(dout, q, k, v, *options)
    assert all(t.is_contiguous() for t in got)
    assert_all_close_to_truth(got, plain, grads, "linear backward")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_linear_attention_gradients(backend, feature_map):
    """Through the public function, as torch forms them by its own rules from the attention matrix."""
    g = generator(4)
    q, k, v, dout = (torch.randn(1, 12, n, 16, generator=g) for n in (4, 2, 2, 4))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = ops.linear_attention(*inputs, feature_map=feature_map, normalize="mean", eps=1e-3, backend=backend)
    got = torch.autograd.grad(out, inputs, dout)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    truth = _linear_truth(*wide, 0 if feature_map == "relu" else 1, 1, 1e-3)
    want = torch.autograd.grad(truth, wide, dout.double())
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close([t.double() for t in got], list(want), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_linear_attention_gradcheck(feature_map):
    g = generator(3)
    args = [torch.rand(1, 5, h, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    run = lambda *a: ops.linear_attention(*a, feature_map=feature_map, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_linear_attention_lets_nan_through(backend):
    """As in any attention, a NaN key spoils the head that reads it, and no other."""
    q, k, v = (torch.randn(1, 6, 2, 16, generator=generator(i)) for i in range(3))
    k[0, 3, 1, 2] = torch.nan
    for feature_map in (0, 1):
        out = kernel(backend, "linear_attention")(q, k, v, feature_map, 0, 1e-6)
        assert out[:, :, 0].isfinite().all()
        assert out[:, :, 1].isnan().any()


def test_linear_attention_refuses():
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="feature_map='softmax'"):
        ops.linear_attention(q, q, q, feature_map="softmax")
    with pytest.raises(ValueError, match="eps=nan"):
        ops.linear_attention(q, q, q, eps=float("nan"))
    for backend in BACKENDS[:-1]:
        linear = kernel(backend, "linear_attention")
        narrow, odd = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 3, 16)
        for args, message in (
            ((narrow, narrow, narrow, 0, 0, 1e-6), "head dim"),
            ((odd, q, q, 0, 0, 1e-6), "heads"),
            ((q, q, q.half(), 0, 0, 1e-6), "v"),
            ((q, q, q[:, 1:], 0, 0, 1e-6), "v"),
            ((q, q, q, 2, 0, 1e-6), "feature_map"),
            ((q, q, q, 0, 2, 1e-6), "normalize"),
            ((q[0], q, q, 0, 0, 1e-6), "q"),
        ):
            with pytest.raises(RuntimeError, match=message):
                linear(*args)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native kernels")
def test_threads_do_not_change_bits():
    g = generator(5)
    q, k, v, dout = (torch.randn(1, 1300, 2, 32, generator=g) for _ in range(4))
    lse = torch.randn(1, 2, 1300, generator=g)
    bits = torch.randint(-(2**31), 2**31, (2, 3, 70, 4), generator=g).to(torch.int32)

    def everything():
        return [
            *kernel("cpu", "merge_attention_backward")(dout, lse, q, lse, k, -lse),
            *kernel("cpu", "linear_attention_backward")(dout, q, k, v, 1, 0, 1e-6),
            kernel("cpu", "linear_attention")(q, k, v, 0, 1, 1e-6),
            *kernel("cpu", "tile_lists")(bits, None, 100, True),
        ]

    one = everything()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, one, everything()))
    finally:
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------- all attention ops
def _samples() -> dict[str, tuple]:
    """Small arguments of every attention op, with every kind of operand."""
    g = generator(6)
    q, k, v = (torch.randn(2, 40, h, 16, generator=g) for h in (4, 2, 2))
    mask = TileMask.from_bool(torch.rand(2, 1, 40, 40, generator=g) < 0.4, (16, 32))
    lists = (*mask.lists(), *mask.transposed_lists(), mask.pattern_of, mask.patterns)
    bias = torch.randn(1, 4, 40, 40, generator=g)
    at = torch.arange(40, dtype=torch.int32)[None]
    scores = (bias, torch.randn(4, 80, generator=g), at + 40, at)
    out, lse, _ = reference.tile_attention(q, k, v, *lists, *scores, None, None, None, 16, 32, 0.25, 0.0, 0)
    return {
        "tile_attention": (q, k, v, *lists, *scores, None, None, None, 16, 32, 0.25, -3.0, 1),
        "tile_attention_backward": (q, lse, q, k, v, out, lse, *lists, *scores, 16, 32, 0.25, 15),
        "attention_column_sums": (q, k, lse, *mask.transposed_lists(), mask.pattern_of, mask.patterns, *scores, 16, 32,
                                  0.25),
        "merge_attention": (q, lse, out, lse + 1),
        "merge_attention_backward": (q, lse, q, lse, out, lse + 1),
        "tile_lists": (mask.bits, mask.pattern_of, mask.columns, True),
        "tile_means": (q, 16, True),
        "select_tiles": (torch.rand(2, 2, 3, 40), None, torch.rand(2, 1, 40) < 0.3, None, MASS, 0.5, 1),
        "linear_attention": (q, k, v, 1, 0, 1e-6),
        "linear_attention_backward": (q, q, k, v, 1, 0, 1e-6),
    }  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the public ops are the same there")
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name):
    args = _samples()[name]
    if SPECS[name].backward is not None:
        args = tuple(
            t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in args
        )
    torch.library.opcheck(op("maskaccel", name), args)


@pytest.mark.parametrize("name", SCHEMAS)
def test_fakes_tell_shape_dtype_and_strides(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = _samples()[name]
    with torch.no_grad():
        real = op("maskaccel", name)(*args)
        with FakeTensorMode() as mode:
            fake = op("maskaccel", name)(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
    for r, f in zip(*((v if isinstance(v, tuple) else (v,)) for v in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is not compiled")
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_in_one_graph(masked):
    """Forward and backward of attention, with the small ops around it. Only the number of patterns may compile anew."""
    torch._dynamo.reset()
    order = TokenOrder((6, 8), None)
    compiled = 0

    def counting(graph, example):
        nonlocal compiled
        compiled += 1
        return graph.forward

    def step(q, k, v, mask):
        out, lse = ops.tile_attention(q, k, v, mask, return_lse=True)
        out, _ = ops.merge_attention(out, lse, v, torch.zeros_like(lse))
        return out + ops.linear_attention(q, k, v)

    run = torch.compile(step, fullgraph=True, backend=counting)
    g = generator(7)
    for radius in (2.5, 2.5, 3.5, 4.5):
        mask = None
        if masked:
            mask = TileMask.from_rule(GridWindow(order, radius, "euclid"), (48, 48), (16, 32))
            mask.lists(), mask.transposed_lists()
        inputs = [torch.randn(1, 48, 2, 16, generator=g, requires_grad=True) for _ in range(3)]
        out, want = run(*inputs, mask), step(*inputs, mask)
        torch.testing.assert_close(out, want)
        got, plain = (torch.autograd.grad(t.square().sum(), inputs) for t in (out, want))
        torch.testing.assert_close(got, plain)
        assert compiled == 1 or (masked and radius > 3 and compiled == 2)


ISAS = ("portable", "avx2", "avx512", "avx512bf16")
LOWER = ISAS[: ISAS.index(native.isa)] if native.isa in ISAS and "cpu" in BACKENDS else ()


@pytest.mark.skipif(not LOWER or INTERPRETED, reason="only the portable kernels, or none, can run here")
@pytest.mark.parametrize("isa", LOWER)
def test_lower_instruction_sets(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "cpu and (merge_attention or linear_attention)"]
    env = os.environ | {"MASKACCEL_CPU_ISA": isa}
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_linear_attention_without_keys_is_zero(normalize: str, backend: str | None) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 0, 2, 16)
    assert torch.equal(ops.linear_attention(q, k, k, normalize=normalize, backend=backend), torch.zeros_like(q))
