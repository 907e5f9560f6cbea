"""Bad input to the token ops: an error that names the argument, its value and what is allowed."""

from __future__ import annotations

import pytest
import torch

from maskaccel import ops
from maskaccel.masks import TokenIndex

X = torch.randn(2, 12, 8)
INDEX = ops.random_keep(2, 12, 5, seed=1)
RAGGED = TokenIndex.from_mask(torch.arange(12)[None] < torch.tensor([[3], [5]]))
LABELS = torch.zeros(12, dtype=torch.int64)
MASK = torch.ones(12, dtype=torch.bool)
K = torch.randn(2, 5, 3, 16)
CACHE = torch.zeros(2, 12, 3, 16)
LOGITS, TOKENS = torch.randn(2, 6, 9), torch.full((2, 6), 9)


def _draw(**kwargs):
    given = {"batch": 2, "n": 12, "keep": 5, "seed": 1, **kwargs}
    return ops.random_keep(given.pop("batch"), given.pop("n"), given.pop("keep"), **given)


def _write(**kwargs):
    given = {"k": K, "v": K.clone(), "k_cache": CACHE, "v_cache": CACHE.clone(), "index": INDEX, **kwargs}
    first = [given.pop(name) for name in ("k", "v", "k_cache", "v_cache", "index")]
    return ops.write_kv_rows(*first, **given)


def _unmask(**kwargs):
    given = {"logits": LOGITS, "tokens": TOKENS, "mask_id": 9, "n": 2, **kwargs}
    first = [given.pop(name) for name in ("logits", "tokens", "mask_id", "n")]
    return ops.confidence_unmask(*first, **given)


BAD = {
    "keep above n": (lambda: _draw(keep=13), ValueError, r"keep=13 must be a count of 1 to 12"),
    "keep below 1": (lambda: _draw(keep=0), ValueError, r"keep=0 must be"),
    "fraction above 1": (lambda: _draw(keep=1.5), ValueError, r"keep=1.5 must be a fraction above 0 up to 1"),
    "fraction 0": (lambda: _draw(keep=0.0), ValueError, r"keep=0.0 must be"),
    "no number": (lambda: _draw(keep="half"), ValueError, r"keep='half' must be"),
    "scheme": (lambda: _draw(scheme="stripes"), ValueError, r"scheme='stripes' is not known; allowed are 'uniform'"),
    "no tokens": (lambda: _draw(n=0), ValueError, r"n=0 must be an integer"),
    "too many": (lambda: _draw(n=1 << 24), ValueError, r"n=16777216 must be an integer, 1 to 16777215"),
    "route": (lambda: _draw(route=-1), ValueError, r"route=-1 must be an integer"),
    "offset": (lambda: _draw(sample_offset=-1), ValueError, r"sample_offset=-1 must be"),
    "seed": (lambda: _draw(seed=0.5), ValueError, r"seed=0.5 must be an integer of 64 bits"),
    "step": (lambda: _draw(step=torch.tensor([1.0])), TypeError, r"step is a tensor of torch.float32"),
    "step of 65 bits": (lambda: _draw(step=1 << 63), ValueError, r"step=9223372036854775808 must be an integer, 0 to"),
    "negative step": (lambda: _draw(step=-1), ValueError, r"step=-1 must be"),
    "forced": (lambda: _draw(force=MASK), ValueError, r"force names 12 tokens, more than the 5 that are kept"),
    "forced in a row": (
        lambda: _draw(keep=6, scheme="row_equal", grid=(3, 4), force=torch.arange(12) < 3),
        ValueError, r"force names 3 tokens in one group, more than the 2",
    ),
    "force dtype": (lambda: _draw(force=MASK.int()), TypeError, r"force has dtype torch.int32; it must be bool"),
    "force shape": (lambda: _draw(force=MASK[:5]), ValueError, r"force has shape \(5,\)"),
    "no grid": (lambda: _draw(scheme="cell"), ValueError, r"scheme='cell' needs the grid"),
    "grid": (lambda: _draw(scheme="cell", grid=(3, 5)), ValueError, r"grid=\(3, 5\) must be sizes whose product is n="),
    "cell share": (lambda: _draw(keep=0.3, scheme="cell", grid=(2, 6)), ValueError, r"no whole number of tokens in a"),
    "cell": (lambda: _draw(keep=6, scheme="cell", grid=(2, 6), cell=(2, 4)), ValueError, r"cell=\(2, 4\) must be size"),
    "row share": (lambda: _draw(keep=5, scheme="row_equal", grid=(3, 4)), ValueError, r"every row of 3 must have as"),
    "rows": (lambda: _draw(scheme="rows_cols", grid=(3, 4)), ValueError, r"keep=5 must be \(rows, columns\)"),
    "rows force": (
        lambda: _draw(keep=(1, 2), scheme="rows_cols", grid=(3, 4), force=MASK), ValueError, r"force cannot be had",
    ),
    "frames": (lambda: _draw(frames=5), ValueError, r"frames=5 must divide n=12"),
    "frames keep": (lambda: _draw(frames=3), ValueError, r"keep=5 must be a multiple of frames=3"),
    "no labels": (lambda: _draw(keep=(0.5,), scheme="classes"), ValueError, r"scheme='classes' needs labels"),
    "labels": (lambda: _draw(labels=LABELS), ValueError, r"labels is for scheme='classes', not 'uniform'"),
    "class share": (
        lambda: _draw(keep=(2.0,), scheme="classes", labels=LABELS), ValueError, r"keep=\(2.0,\) must be one fraction",
    ),
    "ids order": (lambda: TokenIndex.from_keep(torch.tensor([3, 1]), 5), ValueError, r"keep must be strictly ascendin"),
    "ids twice": (lambda: TokenIndex.from_keep(torch.tensor([1, 1]), 5), ValueError, r"no token twice"),
    "ids range": (lambda: TokenIndex.from_keep(torch.tensor([1, 5]), 5), ValueError, r"from 1 to 5; allowed are 0 to "),
    "ids dtype": (lambda: TokenIndex.from_keep(torch.tensor([1.0]), 5), TypeError, r"keep must be a tensor of int32"),
    "too many ids": (lambda: TokenIndex.from_keep(torch.arange(3), 2), ValueError, r"K from 1 to n=2"),
    "number of tokens": (
        lambda: TokenIndex.from_keep(torch.tensor([1]), 5.0), ValueError, r"n=5.0 must be an integer, 1 or more",
    ),
    "all of none": (lambda: TokenIndex.all(0), ValueError, r"n=0 must be an integer, 1 or more"),
    "no such dim": (lambda: INDEX.gather(X, 3), ValueError, r"dim=3; a tensor \(2, 12, 8\) has 3 dims"),
    "mask dtype": (lambda: TokenIndex.from_mask(torch.ones(4)), TypeError, r"mask must be a bool tensor, got"),
    "capacity of no integer": (
        lambda: TokenIndex.from_mask(MASK, capacity=2.0), ValueError, r"capacity=2.0 must be an integer, 1 or more",
    ),
    "nothing kept": (lambda: TokenIndex.from_mask(~MASK), ValueError, r"would have 0 slots"),
    "capacity": (lambda: TokenIndex.from_mask(MASK, capacity=13), ValueError, r"13 slots a sample; allowed are 1 to 1"),
    "no complement": (lambda: TokenIndex.all(4).complement(), ValueError, r"all 4 tokens are kept"),
    "shift": (lambda: RAGGED.shift(1, 1), ValueError, r"a ragged index can be shifted by a prefix alone"),
    "expand": (lambda: INDEX.expand(3), ValueError, r"for 2 samples; it cannot serve 3"),
    "gather dim": (lambda: INDEX.gather(X, 2), ValueError, r"dim 2 of a tensor \(2, 12, 8\) has 8 rows"),
    "gather x": (lambda: ops.gather_rows(X[:, :5], INDEX), ValueError, r"index is of 12 tokens; x has 5"),
    "gather batch": (lambda: ops.gather_rows(torch.cat([X, X]), INDEX), ValueError, r"for 2 samples; x has a batch of"),
    "gather index": (lambda: ops.gather_rows(X, INDEX.keep), TypeError, r"index must be a TokenIndex, got Tensor"),
    "gather dtype": (lambda: ops.gather_rows(X.long(), INDEX), TypeError, r"x has dtype torch.int64"),
    "merge rows": (lambda: ops.scatter_merge(X, X[:, :4], INDEX), ValueError, r"rows has 4 rows a sample; the index k"),
    "merge full": (lambda: ops.scatter_merge(None, X[:, :5], INDEX), ValueError, r"mode='replace' needs full"),
    "merge mode": (lambda: ops.scatter_merge(X, X[:, :5], INDEX, mode="add"), ValueError, r"mode='add' is not known"),
    "merge extra": (
        lambda: ops.scatter_merge(X, X[:, :5], INDEX, lam=0.5), ValueError, r"lam is given, but mode='replace' has non",
    ),
    "merge dtype": (
        lambda: ops.scatter_merge(X.bfloat16(), X[:, :5], INDEX), ValueError, r"full is torch.bfloat16 \(2, 12, 8\)",
    ),
    "merge token": (
        lambda: ops.scatter_merge(None, X[:, :5], INDEX, mode="mask_token", mask_token=X[0, 0, :3]),
        ValueError, r"mask_token has shape \(3,\)",
    ),
    "merge pos": (
        lambda: ops.scatter_merge(None, X[:, :5], INDEX, mode="zero", pos=X[0, :3]), ValueError, r"pos has shape",
    ),
    "merge lam": (
        lambda: ops.scatter_merge(X, X[:, :5], INDEX, mode="blend", lam=1.5), ValueError, r"lam=1.5; allowed are 0 to ",
    ),
    "modulation": (
        lambda: ops.gather_modulate(X, INDEX, X[:, :4]), ValueError, r"scale has shape \(2, 4, 8\); it must be \(B, D",
    ),
    "no rows": (
        lambda: ops.gather_modulate(X.clone().requires_grad_(), INDEX, return_rows=False),
        ValueError, r"return_rows=False has no derivative",
    ),
    "score": (lambda: ops.select_active(X, None, 3), ValueError, r"score has shape \(2, 12, 8\); it must be \(B, N\)"),
    "score grad": (
        lambda: ops.select_active(X[..., 0].clone().requires_grad_(), None, 3), ValueError, r"has no derivative",
    ),
    "active keep": (lambda: ops.select_active(X[..., 0], None, 13), ValueError, r"keep=13 must be"),
    "high": (
        lambda: ops.select_active(X[..., 0], None, 3, high_fraction=1.5), ValueError, r"high_fraction=1.5; allowed are",
    ),
    "threshold nan": (
        lambda: ops.select_active(X[..., 0], None, 3, threshold=float("nan")), ValueError, r"threshold=nan must be",
    ),
    "age": (lambda: ops.select_active(X[..., 0], INDEX.keep, 3), ValueError, r"age has shape \(2, 5\)"),
    "fuse g": (
        lambda: ops.sparse_dense_fuse(X, X, INDEX, torch.randn(8, 16)), ValueError, r"g has shape \(2, 12, 8\); it mus",
    ),
    "fuse weight": (
        lambda: ops.sparse_dense_fuse(X, X[:, :5], INDEX, torch.randn(8, 8)), ValueError, r"must be \(E, 16\)",
    ),
    "fuse path": (
        lambda: ops.sparse_dense_fuse(X, X[:, :5], INDEX, torch.randn(8, 16), path_keep=torch.ones(2)),
        ValueError, r"path_keep is torch.float32 \(2,\); it must be bool \(2,\)",
    ),
    "match ratio": (
        lambda: ops.match_tokens(X, 0.9, grid=(3, 4)), ValueError, r"ratio=0.9 merges 10 of 12 tokens; with cells",
    ),
    "match grid": (lambda: ops.match_tokens(X, 0.5, grid=(3, 5)), ValueError, r"grid=\(3, 5\) must be"),
    "merge mean": (
        lambda: ops.merge_tokens(X, ops.match_tokens(X, 0.5, grid=(3, 4)), mode="max"), ValueError, r"mode='max'",
    ),
    "unmerge": (
        lambda: ops.unmerge_tokens(X, ops.match_tokens(X, 0.5, grid=(3, 4))), ValueError, r"x has 12 rows; the index i",
    ),
    "cache shape": (lambda: _write(k_cache=CACHE[..., :8]), ValueError, r"k_cache has shape"),
    "cache dtype": (lambda: _write(k_cache=CACHE.bfloat16()), TypeError, r"k_cache has dtype torch.bfloat16"),
    "cache fp8": (lambda: _write(k_cache=CACHE.to(torch.float8_e4m3fn)), ValueError, r"needs k_scale"),
    "cache shared": (lambda: _write(v=CACHE[:, :5]), ValueError, r"v shares memory with k_cache"),
    "cache expanded": (
        lambda: _write(k_cache=CACHE[:, :1].expand(2, 12, 3, 16)), ValueError, r"k_cache is written to",
    ),
    "cache rows": (lambda: _write(index=torch.tensor([0, 1, 2, 3, -1])), ValueError, r"index holds -1"),
    "cache index": (lambda: _write(index=INDEX.complement()), ValueError, r"index keeps 7 of 12 tokens; the call writ"),
    "cache table": (lambda: _write(cos=torch.ones(12, 16)), ValueError, r"cos and sin must be given together"),
    "cache grad": (lambda: _write(k=K.clone().requires_grad_()), ValueError, r"write_kv_rows has no derivative"),
    "read": (lambda: ops.read_kv_rows(CACHE, CACHE[..., 0], torch.float32), TypeError, r"must be float8_e4m3fn"),
    "no count": (lambda: _unmask(n=None), ValueError, r"n or threshold must say"),
    "negative count": (lambda: _unmask(n=-1), ValueError, r"n=-1 must be an integer, 0 or more"),
    "negative counts": (lambda: _unmask(n=torch.tensor([1, -2])), ValueError, r"n holds -2"),
    "counts shape": (lambda: _unmask(n=torch.tensor([1, 2, 3])), ValueError, r"n has shape \(3, 1\)"),
    "order": (lambda: _unmask(order="random"), ValueError, r"order='random' is not known"),
    "scores": (lambda: _unmask(order="scores"), ValueError, r"order='scores' needs scores"),
    "tokens": (lambda: _unmask(tokens=TOKENS.int()), ValueError, r"tokens is torch.int32"),
    "temperature": (lambda: _unmask(temperature=-1.0), ValueError, r"temperature=-1.0; allowed are"),
    "scaled": (lambda: _unmask(temperature=0.0, scaled=True), ValueError, r"scaled=True needs a temperature above 0"),
    "nan": (
        lambda: _unmask(logits=LOGITS.index_fill(2, torch.tensor([3]), torch.nan)),
        ValueError, r"logits of token 0 of sample 0 hold a NaN",
    ),
    "noise": (lambda: _unmask(noise=LOGITS.double()), ValueError, r"noise is torch.float64"),
    "backend": (lambda: ops.gather_rows(X, INDEX, backend="cuda"), ValueError, r"backend='cuda' cannot run this call"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    CACHE.zero_()
    with pytest.raises(error, match=message):
        call()
    assert not CACHE.any()  # nothing was written


def test_a_nan_where_nothing_is_masked_is_not_read():
    logits = LOGITS.clone()
    logits[0, 2] = torch.nan
    tokens = TOKENS.clone()
    tokens[0, 2] = 4
    out, confidence = ops.confidence_unmask(logits, tokens, 9, 100)
    assert out[0, 2] == 4 and confidence[0, 2] == torch.inf and (out != 9).all()


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    index = _draw(batch=np.int64(2), n=np.int64(12), keep=np.float32(0.5), seed=np.int64(1), step=np.int32(0))
    assert torch.equal(index.keep, _draw(keep=0.5).keep)
    assert _draw(keep=np.int64(5)).kept == 5
