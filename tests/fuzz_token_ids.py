"""Random calls of the ops that choose tokens, compared with the reference bit for bit.

`triton_interpreted_token_ids.py` runs a few; for many:

    TRITON_INTERPRET=1 python tests/fuzz_token_ids.py --backend triton --cases 1000
    python tests/fuzz_token_ids.py --backend cpu --cases 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from _raw_cases import describe, draw
from _raw_tokens import EXACT

from maskaccel.ops.tokens import reference


def check(seed: int, kernels: Mapping[str, Callable]) -> None:
    """Assert that one random call of each op gives the bits of the reference."""
    for name in EXACT:
        args = draw(name, seed, torch.float32)
        got, wanted = kernels[name](*args), reference.KERNELS[name](*args)
        if isinstance(got, torch.Tensor):
            got, wanted = (got,), (wanted,)
        for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
            assert g.dtype == w.dtype and torch.equal(g, w), f"{name}[{i}], seed {seed}: {describe(args)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("triton", "cpu"), required=True)
    parser.add_argument("--cases", type=int, default=1000)
    args = parser.parse_args()
    if args.backend == "triton":
        import _triton_cases  # noqa: F401  (a quicker interpreter)

        from maskaccel.ops.tokens import triton_launch_select
        from maskaccel.ops.tokens.triton import KERNELS

        kernels: Mapping[str, Callable] = KERNELS
    else:
        kernels = {name: getattr(torch.ops.maskaccel_raw, name) for name in EXACT}
    for seed in range(args.cases):
        if args.backend == "triton":
            triton_launch_select.WHOLE = 128 if seed % 2 else 8192  # every other case walks long rows in blocks
        check(seed, kernels)
    print(f"{args.cases} calls of {', '.join(EXACT)}: equal to the reference")


if __name__ == "__main__":
    main()
