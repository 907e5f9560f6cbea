"""Random calls of the ops that choose tokens, compared with the reference bit for bit.

The tests run a few of them; for many:

    TRITON_INTERPRET=1 python tests/fuzz_token_ids.py --backend triton --cases 1000
    python tests/fuzz_token_ids.py --backend cpu --cases 1000
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from maskaccel.ops.tokens import reference

MASK = 9


class Draw:
    """Seeded choices and integer tensors."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.g = torch.Generator().manual_seed(seed)

    def ints(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.g).to(dtype)

    def chance(self, share: float) -> bool:
        return self.pick.random() < share

    def some(self, share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g) < share

    def lead(self, batch: int) -> int:
        return self.pick.choice([1, batch])

    def seed(self) -> int:
        return self.pick.choice([0, self.pick.getrandbits(63), -self.pick.getrandbits(62)])

    def step(self) -> Tensor:
        return torch.tensor([self.pick.choice([0, 1, self.pick.getrandbits(40), -1])])

    def offset(self) -> int:
        return self.pick.choice([0, 3, (1 << 32) - 1, 1 << 40])


def random_keep(d: Draw) -> tuple:
    pick = d.pick
    mode, batch = pick.choice([0, 0, 1, 2]), pick.choice([1, 2, 3])
    order = labels = quota = force = None
    groups, rows_kept = 1, 0
    if mode == 0:
        groups, size = pick.choice([1, 1, 2, 3, 8]), pick.choice([1, 2, 4, 5, 16, 40])
        n, keep = groups * size, groups * pick.randint(1, size)
        order = torch.randperm(n, generator=d.g).int() if d.chance(0.5) else None
    elif mode == 1:
        groups, columns = pick.choice([1, 3, 8]), pick.choice([1, 4, 10])
        n, rows_kept = groups * columns, pick.randint(1, groups)
        keep = rows_kept * pick.randint(1, columns)
    else:
        n, classes = pick.choice([1, 7, 40, 64]), pick.choice([1, 2, 4])
        keep = pick.randint(1, n)
        labels = d.ints(-1, classes + 1, d.lead(batch), n)
        quota = d.ints(0, n + 1, d.lead(batch), classes)
    if mode != 1 and d.chance(0.5):
        force = d.some(0.3, d.lead(batch), n).to(torch.uint8)
    route = pick.choice([0, 5, (1 << 24) - 1])
    end = (d.offset(), batch, n, keep, groups, rows_kept, mode)
    return (d.step(), order, labels, quota, force, d.seed(), route, *end)


def select_active(d: Draw) -> tuple:
    pick = d.pick
    batch, n = pick.choice([1, 2]), pick.choice([1, 5, 33, 60])
    keep = pick.randint(1, n)
    score = d.ints(-3, 4, batch, n, dtype=torch.float32) * pick.choice([0.5, -0.25])  # few values: ties, -0.0
    for spoilt in (math.nan, -math.inf, math.inf):
        if d.chance(0.2):
            score[d.some(0.2, batch, n)] = spoilt
    decay = torch.rand(pick.choice([1, 4]), generator=d.g)
    force = d.some(0.3, d.lead(batch), n).to(torch.uint8) if d.chance(0.6) else None
    flags = pick.choice([0, 1])
    high = 0 if flags else pick.choice([0, pick.randint(0, n - keep)])
    return score, d.ints(-1, 6, batch, n), decay, force, keep, high, pick.choice([0.0, 0.3, -math.inf]), flags


def unmask_select(d: Draw) -> tuple:
    pick = d.pick
    batch, n, kinds = pick.choice([1, 2]), pick.choice([1, 7, 40, 70]), pick.choice([1, 1, 3])
    tokens = d.ints(0, 3, batch, n, dtype=torch.int64).masked_fill(d.some(0.6, batch, n), MASK)
    confidence = d.ints(-3, 4, batch, n, dtype=torch.float32) * 0.25
    confidence[d.some(0.1, batch, n)] = pick.choice([math.nan, -math.inf, 0.5])
    groups = None if d.chance(0.4) else d.ints(-1, kinds + 1, d.lead(batch), n)
    hold = d.some(0.3, d.lead(batch), n).to(torch.uint8) if d.chance(0.3) else None
    # noise is given: the logarithms of the backends need not agree in the last bit
    temperature, noise = pick.choice([0.0, 0.5]), d.ints(-3, 4, batch, n, dtype=torch.float32)
    count = d.ints(0, n + 1, d.lead(batch), kinds)
    end = (MASK, d.seed(), d.offset(), pick.choice([math.inf, 0.6]), temperature)
    return confidence, tokens + 100, tokens, d.step(), count, groups, hold, noise, *end


CALLS: dict[str, Callable[[Draw], tuple]] = {
    "random_keep": random_keep,
    "select_active": select_active,
    "unmask_select": unmask_select,
}


def as_tuple(value: Tensor | tuple) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def check(seed: int, kernels: Mapping[str, Callable]) -> None:
    """Assert that one random call of each op gives the bits of the reference."""
    for name, draw in CALLS.items():
        args = draw(Draw(seed))
        got, wanted = as_tuple(kernels[name](*args)), as_tuple(reference.KERNELS[name](*args))
        for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
            assert g.dtype == w.dtype, (name, seed, i, g.dtype)
            assert torch.equal(g, w), (name, seed, i, args, g, w)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("triton", "cpu"), required=True)
    parser.add_argument("--cases", type=int, default=1000)
    args = parser.parse_args()
    if args.backend == "triton":
        from maskaccel.ops.tokens import triton_launch_select
        from maskaccel.ops.tokens.triton import KERNELS

        kernels: Mapping[str, Callable] = KERNELS
    else:
        kernels = {name: getattr(torch.ops.maskaccel_raw, name) for name in CALLS}
    for seed in range(args.cases):
        if args.backend == "triton":
            triton_launch_select.WHOLE = 32 if seed % 2 else 8192  # every other case walks its rows in blocks
        check(seed, kernels)
    print(f"{args.cases} calls of {', '.join(CALLS)}: equal to the reference")


if __name__ == "__main__":
    main()
