"""Variants of the forward on sm_90a beside the shipped kernel: other blocks, stages, consumers, turns, exponentials.

`tools/build_variants.py` compiles them into `build/variants/libmaskaccel_variants.so`, which travels with the source.
Every variant is compared with the shipped op before it is timed; all of a head dim run interleaved.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import paths  # noqa: F401
import torch
from stage import Context, Record, Target
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import TileMask
from maskaccel.ops.attention.schema import SCHEMAS

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "variants" / "libmaskaccel_variants.so"
NAMESPACE = "maskaccel_variants"
SECONDS = 60.0
GAIN = 1.01  # a variant that is ahead by less is not worth a change


@dataclass(frozen=True)
class Variant:
    """Other constants of the kernel.

    Attributes:
        dim: Head dim of the kernel (`Shapes`); heads of 72 use that of 80.
        tuning: What differs, by the names of `csrc/attention/cuda_sm90_tuning.h`.
    """

    dim: int
    tuning: dict[str, int]

    @property
    def rows(self) -> int:
        """Query rows of an item, which those of a mask's tiles are a multiple of."""
        return 64 * self.tuning.get("consumers", 2)

    @property
    def keys(self) -> int:
        """Keys of a block, the same."""
        return self.tuning.get("keys", 64 if self.dim > 128 else 128)

    def serves(self, block: tuple[int, int] | None) -> bool:
        """Whether it takes masks of these tiles; None: no mask."""
        return block is None or (block[0] % self.rows == 0 and block[1] % self.keys == 0)

    @property
    def definition(self) -> str:
        """The value of MASKACCEL_TUNING."""
        return ";".join(f"t.{name}={value}" for name, value in {"dim": self.dim, **self.tuning}.items())


VARIANTS = {
    "d64_no_turns": Variant(64, {"turns": 0}),
    "d64_polynomial_4": Variant(64, {"polynomial": 4}),
    "d64_polynomial_8": Variant(64, {"polynomial": 8}),
    "d64_consumers_3": Variant(64, {"consumers": 3}),
    "d64_consumers_3_polynomial_4": Variant(64, {"consumers": 3, "polynomial": 4}),
    "d64_keys_192": Variant(64, {"keys": 192, "stages": 3}),
    "d80_no_turns": Variant(80, {"turns": 0}),
    "d80_polynomial_4": Variant(80, {"polynomial": 4}),
    "d80_keys_160": Variant(80, {"keys": 160, "stages": 2}),
    "d128_no_turns": Variant(128, {"turns": 0}),
    "d128_stages_2": Variant(128, {"stages": 2}),
    "d128_keys_176": Variant(128, {"keys": 176, "stages": 2}),
    "d128_keys_160": Variant(128, {"keys": 160, "stages": 2}),
    "d128_keys_96": Variant(128, {"keys": 96, "stages": 4}),
    "d128_keys_64": Variant(128, {"keys": 64, "stages": 6}),
    "d128_polynomial_8": Variant(128, {"polynomial": 8}),
    "d128_window_4": Variant(128, {"window": 4}),
    "d128_window_64": Variant(128, {"window": 64}),
    "d256_turns": Variant(256, {"turns": 1}),
    "d256_keys_80": Variant(256, {"keys": 80, "stages": 2}),
}

# (head dim, tokens): the most telling first
ITEMS = tuple((dim, tokens) for tokens in (16384, 4096, 65536) for dim in (128, 64, 72, 256))
# name: share of tiles kept, tiles, whether heads share the mask
MASKS: dict[str, tuple[float, tuple[int, int], bool]] = {
    "25% of 128 x 128": (0.25, (128, 128), False),
    "10% of 128 x 128": (0.1, (128, 128), False),
    "25% of 384 x 384": (0.25, (384, 384), False),
    "25% of 128 x 128, shared": (0.25, (128, 128), True),
}


def load() -> None:
    """Define the ops of all variants, and load the library."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in VARIANTS:
        library.define(name + SCHEMAS["tile_attention"])
    load.library = library  # type: ignore[attr-defined]  # its ops live as long as it
    torch.ops.load_library(str(LIBRARY))


def _is_built(name: str) -> bool:
    """Whether the loaded library holds the variant: it may have been built of some, and leaves faulty ones out."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA")


def items(context: Context) -> list[str]:
    """Head dims at lengths; nothing where the library was not built."""
    if context.tiny:
        return ["64 256"]
    return [f"{dim} {tokens}" for dim, tokens in ITEMS] if LIBRARY.is_file() else []


def call(name: str, q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None) -> Tensor:
    """Attention by one variant."""
    lists = (None,) * 8 if mask is None else (*mask.lists(), None, None, None, mask.pattern_of, mask.patterns)
    block = (128, 128) if mask is None else mask.block
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    return op(q, k, v, *lists, *(None,) * 7, *block, q.shape[3] ** -0.5, 0.0, 0)[0]


def _mask(tokens: int, heads: int, kept: float, block: tuple[int, int], shared: bool, device: str) -> TileMask:
    """Tiles at random places, rows of many lengths: half of the share to one and a half of it."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (-(-tokens // b) for b in block)
    share = kept * (0.5 + torch.rand(1 if shared else heads, rows, 1, generator=generator))
    tiles = torch.rand(share.shape[0], rows, columns, generator=generator) < share
    tiles[..., 0] = True
    mask = TileMask.from_tiles(tiles, (tokens, tokens), block).to(device)
    mask.lists()
    return mask


def _distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def run(item: str, context: Context) -> Record:
    """All variants of one head dim, at one length, dense and with masks."""
    dim, tokens = map(int, item.split())
    heads = 2 if context.tiny else max(1, 24 * 4096 // tokens)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, generator=generator).to(context.device, torch.bfloat16) for _ in "qkv"
    )
    width = 80 if dim == 72 else dim
    names: list[str] = []  # a dry run: the shipped op against itself
    if context.device == "cuda":
        load()
        names = [name for name, variant in VARIANTS.items() if variant.dim == width and _is_built(name)]
        if not names:
            return {"summary": f"no variant for heads of {dim} in {LIBRARY.name}"}
    found: dict[str, Any] = {}
    for label, chosen in {"dense": None, **MASKS}.items():
        mask = None if chosen is None else _mask(tokens, heads, *chosen, context.device)
        shipped: Callable[[], Tensor] = partial(ops.tile_attention, q, k, v, mask)
        want = shipped()
        calls, off = {"shipped": shipped}, {}
        for name in names:
            if not VARIANTS[name].serves(None if mask is None else mask.block):
                continue
            distance = _distance(call(name, q, k, v, mask), want)
            if distance < 0.02:  # two roundings to bf16 of the largest value, and of weights
                calls[name] = partial(call, name, q, k, v, mask)
            else:
                off[name] = distance
        assert _distance(shipped(), want) == 0, "the shipped op gives other bits the second time"
        ms = {name: statistics.median(times) for name, times in context.samples(calls).items()}
        best = min(ms, key=ms.__getitem__)
        winner = best if ms["shipped"] / ms[best] > GAIN else "shipped"
        found[label] = {"ms": ms, "off": off, "winner": winner, "gain": ms["shipped"] / ms[winner]}
        print(f"{item} {label}: {winner} {found[label]['gain']:.3f}x", flush=True)
    wrong = sorted({name for record in found.values() for name in record["off"]})
    won = {label: f"{r['winner']} {r['gain']:.3f}x" for label, r in found.items() if r["winner"] != "shipped"}
    return {"cases": found, "wrong": wrong, "summary": f"{won or 'shipped'}" + (f"; wrong: {wrong}" if wrong else "")}


def targets(records: dict[str, Record]) -> list[Target]:
    """No variant ahead of what ships."""
    gains = [r["gain"] for record in records.values() for r in record.get("cases", {}).values()]
    return [
        Target("best variant of the forward over the shipped one", GAIN, max(gains) if gains else None, at_most=True)
    ]


def table(records: dict[str, Record]) -> str:
    """Milliseconds of every variant."""
    lines = ["| head dim, tokens | mask | shipped, ms | variants, times the shipped speed |", "|---|---|---|---|"]
    for item, record in records.items():
        for label, r in record.get("cases", {}).items():
            ms = r["ms"]
            rest = sorted((name for name in ms if name != "shipped"), key=ms.__getitem__)
            speeds = ", ".join(f"{name} {ms['shipped'] / ms[name]:.3f}" for name in rest)
            lines.append(f"| {item.replace(' ', ', ')} | {label} | {ms['shipped']:.3f} | {speeds or '-'} |")
    return "\n".join(lines) + "\n"
