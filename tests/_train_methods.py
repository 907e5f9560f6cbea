"""What the tests of training methods share: modules and numbers in fp64, and a method's result against a formula."""

from __future__ import annotations

import torch
from _attention_layers import random_parameters
from torch.nn import functional as F

from maskaccel.masks import TokenIndex


def double(module, seed=0):
    """The module in fp64, with values that no initialisation at zero hides behind."""
    random_parameters(module, seed)
    return module.double()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_tokens(batch, n, keep, seed=0):
    """`keep` tokens of each sample."""
    keys = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))
    return TokenIndex.from_keep(keys.argsort(1)[:, :keep].sort(1).values, n)


def of(parameters, prefix):
    """The parameters of a submodule, by their names in it."""
    return {name[len(prefix) + 1 :]: p for name, p in parameters.items() if name.startswith(prefix + ".")}


def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(q, k, v, bias=0.0):
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def adaln_block(p, x, c, count, bias=0.0, skip=None):
    """The block of DiT; `bias` is added to the scores, -inf masks keys."""
    dim = x.shape[-1:]
    if skip is not None:
        x = linear(p, "skip_linear", torch.cat([x, skip], -1))
    mods = linear(p, "adaLN_modulation.1", F.silu(c))
    mods = (mods[:, None] if mods.dim() == 2 else mods).chunk(6, -1)
    y = F.layer_norm(x, dim, eps=1e-6) * (1 + mods[1]) + mods[0]
    q, k, v = (heads(t, count) for t in linear(p, "attn.qkv", y).chunk(3, -1))
    x = x + mods[2] * linear(p, "attn.proj", attention(q, k, v, bias))
    y = F.layer_norm(x, dim, eps=1e-6) * (1 + mods[4]) + mods[3]
    return x + mods[5] * linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", y), approximate="tanh"))


def adaln_linear(p, x, c):
    shift, scale = linear(p, "adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    return linear(p, "linear", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


def restored(rows, index, token):
    """Rows at their places, the token elsewhere, by a loop."""
    full = token.expand(len(rows), index.n, -1).clone()
    keep = index.keep.expand(len(rows), -1).long()
    return full.scatter(1, keep[..., None].expand_as(rows), rows)


def assert_same(got, want, leaves=(), tolerance=1e-9):
    """Results and the gradients of the leaves; returns the latter."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = normal(*got.shape, seed=5)
    pairs = [torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) for out in (got, want) if leaves]
    for i, (a, b) in enumerate(zip(*pairs, strict=True)):
        a, b = torch.broadcast_tensors(*(torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b)))
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, i=i: f"leaf {i}: {m}")
    return pairs[1] if pairs else []
