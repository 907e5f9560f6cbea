"""A layer against its paper's formula, by the error rule: forward, and the gradients of inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from _numerics import assert_close_to_truth
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16]


def tokens(count: int, dim: int, seed: int = 1) -> Tensor:
    """Two samples of random tokens, `(2, count, dim)`."""
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed))


def random_parameters(module: nn.Module, seed: int = 0) -> None:
    """Values that no initialisation at zero hides behind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = p.shape[-1] ** -0.5 if p.dim() == 2 and name.endswith("weight") else 0.2
            p.copy_(p + noise * scale if p.dim() == 1 else noise * scale)


def check(
    module: nn.Module,
    formula: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    call: Callable[..., Tensor] | None = None,
) -> None:
    """`call(*inputs)` of the module in a dtype against `formula(parameters, *inputs)` in it and in fp64."""
    random_parameters(module)
    module.to(dtype)
    narrow = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    parameters = dict(module.named_parameters())
    results = []
    for wide in (None, dtype, torch.float64):
        at = [t.detach().to(wide or dtype).requires_grad_() if t.is_floating_point() else t for t in narrow]
        if wide is None:
            values = parameters
            out = (call or module)(*at)
        else:
            values = {name: p.detach().to(wide).requires_grad_() for name, p in parameters.items()}
            out = formula(values, *at)
        ones = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype).to(out.dtype)
        leaves = {f"input {i}": t for i, t in enumerate(at) if t.requires_grad} | values
        grads = torch.autograd.grad(out, list(leaves.values()), ones)
        results.append({"out": out.detach()} | dict(zip(leaves, grads, strict=True)))
    for name, truth in results[2].items():
        got, plain = results[0][name], results[1][name]
        if name == "k.bias":
            # The same number is added to all scores of a query: softmax does not see it.
            assert max(t.abs().max() for t in (truth, got / 1e9, plain / 1e9)) < 1e-9
            continue
        assert truth.abs().max() > 1e-6, f"{name} is zero: the case tests nothing"
        if truth.numel() < 8:
            # A sum of thousands of terms that cancel: by luck plain torch's single number may be nearly right. In bf16
            # what is left of it is mostly rounding; fp32 decides.
            error = (got.double() - truth).abs().max() / truth.abs().max()
            assert error < (5e-5 if dtype == torch.float32 else 0.5), f"{name}: {error}"
        else:
            # several ops one after the other, each with roundings of its own
            assert_close_to_truth(got, plain, truth, what=name, magnitude=16 * truth.abs().max().item())


def heads_of(x: Tensor, heads: int) -> Tensor:
    """`(B, S, C)` as `(B, H, S, D)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, bias=0.0, keep: Tensor | None = None) -> Tensor:
    """Of `(B, H, S, D)`, with rows that keep nothing at 0; returns `(B, S, C)`."""
    scores = q @ k.mT * scale + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -1e30)
    weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).flatten(2)


def project(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A linear of the layer."""
    bias = p.get(f"{name}.bias")
    return nn.functional.linear(x, p[f"{name}.weight"], bias)


def qkv_heads(p: dict[str, Tensor], x: Tensor, heads: int, name: str = "qkv") -> list[Tensor]:
    """q, k and v `(B, H, S, D)`."""
    return [heads_of(t, heads) for t in project(p, name, x).chunk(3, dim=-1)]


def conv(p: dict[str, Tensor], name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A depth-wise convolution over tokens."""
    weight = p[f"{name}.weight"]
    maps = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    out = nn.functional.conv2d(maps, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=x.shape[2])
    return out.flatten(2).transpose(1, 2)


def places(*grid: int) -> Tensor:
    """`(S, axes)` of a grid in raster order."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), dim=-1).flatten(0, -2)
