"""Compile every Triton kernel ahead of time, without a GPU, and report registers, spills and shared memory.

The kernels are reached through the same Python calls as in use (`KERNELS` of the Triton backends), with tensors on the
meta device and a launcher that compiles instead of launching: what is compiled is what a GPU would be asked to run,
with the argument specialisation Triton would choose. The list below is representative, not exhaustive: width 3072 and
head dim 128, in bf16 and fp32, every kernel forward and backward; each flag and operand form appears at least once per
dtype, but not every product of them (there are thousands).

    python tools/compile_triton.py                       # sm_80, 90, 100, 120
    python tools/compile_triton.py --arch 90 --json out.json
    python tools/compile_triton.py --arch 90 --only random --random 4   # random calls of every op

Exits with 1 if a kernel does not compile, or if one spills more than SPILL_LIMIT bytes a thread; smaller spills are
listed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from triton_token_cases import token_cases

ARCHS = (80, 90, 100, 120)
WIDTH, HEAD_DIM, HEADS, TOKENS, BATCH = 3072, 128, 24, 64, 2
ALL = (1 << 10) - 1
NARROW, PLUS_ONE, RMS, TANH, CLAMP, SIGMOID, POST_RMS, POST_LAYER, CLIP = 4, 8, 1, 16, 32, 48, 64, 128, 256
HALF, ACROSS = 32, 16

# ptxas stops at a register count that lets more threads be resident and stores the last few values to reach it (seen:
# 8 to 16 bytes at 40 and 64 registers, up to 40 at the limit of 128). Such spills are listed; larger ones fail.
SPILL_LIMIT = 48


@dataclass
class Compiled:
    """One kernel for one architecture."""

    arch: int
    case: str
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    seconds: float
    digest: str


class _NoDevice:
    """Stands in for Triton's driver: names a target, has no device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a cubin; local memory is where registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def cases(random: int = 0) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of everything to compile, and so many random calls of every op; names start with the dtype."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from cases_of(dtype)
        yield from small_attention_cases(dtype)
        yield from token_cases(dtype)
        yield from random_cases(dtype, random)


def random_cases(dtype: torch.dtype, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls over the whole contract, which meet other specialisations: sizes of one, odd strides, absent operands."""
    if not count:
        return
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from _raw_cases import OPS, draw

    from maskaccel.ops._backends import _TRITON_MODULES

    kernels = {name: kernel for m in _TRITON_MODULES for name, kernel in importlib.import_module(m).KERNELS.items()}

    def empty(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")

    for op in OPS:
        for seed in range(count):
            args = tuple(map(empty, draw(op, seed, dtype)))
            name = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} random {op} {seed}"
            yield name, lambda op=op, args=args: kernels[op](*args)


def cases_of(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls of one activation dtype."""
    from maskaccel.ops.adaln.triton import KERNELS as adaln
    from maskaccel.ops.steps.triton import KERNELS as steps

    prefix = "bf16" if dtype == torch.bfloat16 else "fp32"

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(BATCH, TOKENS, WIDTH)
    gate, scale, shift = empty(BATCH, 6 * WIDTH).chunk(6, 1)[:3]
    frame, token = empty(BATCH, 4, WIDTH), empty(BATCH, TOKENS, 6, WIDTH)[:, :, 1]
    table, weight = empty(WIDTH), empty(WIDTH)
    rows, indexed = empty(BATCH, TOKENS, dtype=torch.int32), empty(1000, WIDTH)
    none5 = (None,) * 5
    ends = (1e-6, 1e-6, 1.0)

    def norm(flags: int, mods: tuple, rest: tuple = none5, x: torch.Tensor = x) -> Callable[[], Any]:
        pair = "_pair" if len(mods) == 4 else ""
        return lambda: adaln["norm_modulate" + pair](x, *mods, *rest, 1e-6, 1.0, flags)

    def norm_back(
        flags: int, mods: tuple, rest: tuple = none5, x: torch.Tensor = x, needs: int = ALL
    ) -> Callable[[], Any]:
        four = (*mods, None, None)[:4]
        dy2 = x if len(mods) == 4 else None
        return lambda: adaln["norm_modulate_backward"](x, dy2, x, *four, *rest, 1e-6, 1.0, flags, needs)

    def fused(flags: int, gating: tuple, mods: tuple, rest: tuple = none5, x: torch.Tensor = x) -> Callable[[], Any]:
        pair = "_pair" if len(mods) == 4 else ""
        return lambda: adaln["gate_residual_norm_modulate" + pair](x, x, *gating, *mods, *rest, *ends, flags)

    def fused_back(
        flags: int, gating: tuple, mods: tuple, rest: tuple = none5, x: torch.Tensor = x
    ) -> Callable[[], Any]:
        four = (*mods, None, None)[:4]
        dy2 = x if len(mods) == 4 else None
        return lambda: adaln["gate_residual_norm_modulate_backward"](
            x, x, dy2, x, x, *gating, *four, *rest, *ends, flags, ALL
        )

    variants: dict[str, tuple[int, tuple, tuple, tuple]] = {
        "layer": (0, (gate, None, None), (scale, shift), none5),
        "layer-narrow-frame": (NARROW, (frame, None, None), (frame, frame), none5),
        "layer-tables-token": (0, (token, table, None), (token, token), (weight, weight, table, table, None)),
        "layer-pair-rows-clip": (CLIP, (indexed, None, None), (indexed,) * 4, (None, None, None, None, rows)),
        "rms-tanh-sandwich": (RMS | TANH | POST_RMS | PLUS_ONE, (gate, None, weight), (scale, None),
                              (weight, None, None, None, None)),
        "rms-narrow-clamp": (RMS | NARROW | CLAMP | POST_LAYER, (gate, table, weight), (scale, shift),
                             (weight, weight, table, table, None)),
        "rms-sigmoid": (RMS | SIGMOID, (gate, None, None), (scale, shift), (weight, None, None, None, None)),
    }  # fmt: skip
    for name, (flags, gating, mods, rest) in variants.items():
        yield f"{prefix} residual+norm {name}", fused(flags, gating, mods, rest)
        yield f"{prefix} residual+norm backward {name}", fused_back(flags & ~NARROW, gating, mods, rest)
        if name.startswith("layer"):
            yield f"{prefix} norm {name}", norm(flags & 15, mods, rest)
            yield f"{prefix} norm backward {name}", norm_back(flags & 3, mods, rest)
        if name in ("layer", "rms-tanh-sandwich", "rms-narrow-clamp"):
            yield f"{prefix} residual {name}", lambda f=flags, g=gating: adaln["gate_residual"](x, x, *g, None, 1e-6, f)
            yield (
                f"{prefix} residual backward {name}",
                lambda f=flags & ~NARROW, g=gating: adaln["gate_residual_backward"](x, x, *g, None, 1e-6, f, ALL),
            )
    q, head, heads = empty(BATCH, TOKENS, HEADS, HEAD_DIM), empty(HEAD_DIM), empty(HEADS * HEAD_DIM)
    half = empty(TOKENS, HEAD_DIM // 2, 2, dtype=torch.float32)
    full = empty(TOKENS, HEAD_DIM, dtype=torch.float32)
    per_head = empty(BATCH, TOKENS, HEADS, HEAD_DIM, dtype=torch.float32)
    plain = (head, head, None, None)
    rotary: dict[str, tuple[int, tuple, tuple]] = {
        "rms-interleaved-complex": (RMS, plain, (half[..., 0], half[..., 1], None)),
        "rms-interleaved-full-narrow": (RMS | NARROW, plain, (full, full, None)),
        "rms-half-full-positions": (RMS | HALF, plain, (full, full, empty(BATCH, TOKENS, dtype=torch.int32))),
        "rms-across-heads": (RMS | ACROSS, (heads, heads, None, None), (half[..., 0], half[..., 1], None)),
        "layer-per-head-tables": (0, (head,) * 4, (per_head, per_head, None)),
        "layer-across-half": (ACROSS | HALF, (heads,) * 4, (full, full, None)),
        "rms-norm-only": (RMS, plain, (None, None, None)),
    }
    for name, (flags, weights, tables) in rotary.items():
        yield f"{prefix} qk {name}", lambda f=flags, w=weights, t=tables: adaln["qk_norm_rope"](q, q, *w, *t, 1e-6, f)
        yield (
            f"{prefix} qk backward {name}",
            lambda f=flags, w=weights, t=tables: adaln["qk_norm_rope_backward"](q, q, q, q, *w, *t, 1e-6, f, 63),
        )
    wide, narrow = empty(256, 8 * WIDTH), empty(256, 4 * WIDTH)
    for name, flags in (("swiglu", 0), ("geglu", 1), ("gelu_tanh", 2), ("swiglu-gate-first", 4)):
        grad = wide if flags == 2 else narrow
        yield f"{prefix} activation {name}", lambda f=flags: adaln["gated_activation"](wide, f)
        yield (
            f"{prefix} activation backward {name}",
            lambda f=flags, g=grad: adaln["gated_activation_backward"](g, wide, f),
        )
    yield f"{prefix} relative_difference", lambda: steps["relative_difference"](x, x, None)
    yield f"{prefix} relative_difference base", lambda: steps["relative_difference"](x, x, x)
    for count in (1, 2, 4):
        history = empty(count, BATCH, TOKENS, WIDTH)
        weights = empty(count, dtype=torch.float32)
        yield f"{prefix} combine K={count}", lambda h=history, w=weights: steps["combine_history"](h, w, x, frame)
        yield f"{prefix} gram K={count}", lambda h=history: steps["gram"](h, False)
    yield f"{prefix} gram K=16 per sample", lambda: steps["gram"](empty(16, BATCH, TOKENS, WIDTH), True)
    stack = empty(4, 2, BATCH, TOKENS, WIDTH)
    for name, shape in (("shared", (2,)), ("per site", (4, 2)), ("per channel", (4, 2, WIDTH))):
        weights = empty(*shape, dtype=torch.float32)
        gates = empty(4, BATCH, 6 * WIDTH)[..., :WIDTH] if name == "per site" else None
        yield f"{prefix} sites {name}", lambda w=weights, g=gates: steps["combine_sites"](stack, w, x, g)
    normed: dict[str, tuple] = {
        "layer": (scale, shift, None, None, None, None, None, 1e-6, 1.0, 0),
        "layer-narrow-token": (token, token, weight, weight, table, table, None, 1e-6, 1.0, NARROW),
        "rms-rows": (indexed, indexed, weight, None, None, None, rows, 1e-6, 1.0, RMS | PLUS_ONE),
    }
    for name, end in normed.items():
        past = empty(1 if name == "rms-rows" else 3, BATCH, TOKENS, WIDTH)
        shape = (3, WIDTH) if name == "layer-narrow-token" else past.shape[:1]
        weights = empty(*shape, dtype=torch.float32)
        yield (
            f"{prefix} combine+norm {name}",
            lambda p=past, w=weights, e=end: steps["combine_history_norm_modulate"](p, w, x, frame, *e),
        )
        yield f"{prefix} norm+difference {name}", lambda e=end: steps["norm_modulate_difference"](x, x, *e)
    past, one = empty(2, BATCH, TOKENS, WIDTH), torch.ones(1, dtype=torch.float32, device="meta")
    fresh, index = empty(BATCH, 16, WIDTH), empty(BATCH, 16, dtype=torch.int32)
    for name, h, gate, labels, gamma in (
        ("rows", past[:1], None, None, 0.0), ("clusters", past, frame, rows, 0.25), ("channels", past, None, rows, 0.25)
    ):  # fmt: skip
        w = one if name == "rows" else empty(*((2, WIDTH) if name == "channels" else (2,)), dtype=torch.float32)
        yield (
            f"{prefix} scatter {name}",
            lambda h=h, w=w, at=labels, g=gate, share=gamma: steps["scatter_combine"](
                h, w, fresh, index, at, x, g, 0, share
            ),
        )
    for name, metric in (("l2", 0), ("l1", 1), ("cosine", 2)):
        yield f"{prefix} kmeans {name}", lambda m=metric: steps["kmeans"](x, None, 16, 1, m)
    per_channel = empty(4, WIDTH, dtype=torch.float32)
    yield f"{prefix} combine K=4 per channel", lambda h=history: steps["combine_history"](h, per_channel, None, None)
    yield from attention_cases(dtype, prefix)


def attention_cases(dtype: torch.dtype, prefix: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Attention: the head dims of most models, with and without each part of the mask; fp32 at one head dim."""
    from maskaccel.ops.attention.schema import KEEP, PRUNE
    from maskaccel.ops.attention.triton import KERNELS

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def operands(width: int, mask: str, length: int, bn: int = 128) -> tuple[tuple, tuple, tuple]:
        """((q, k, v), lists in both orientations with patterns, (bm, bn, scale))."""
        q = empty(BATCH, length, HEADS, width)
        bm, shape = bn, (-(-length // bn), -(-length // bn))
        lists: tuple = (None,) * 3
        patterns: tuple = (None, None)
        if mask != "dense":
            lists = tuple(empty(*s, dtype=torch.int32) for s in ((1, 1, *shape), (1, 1, shape[0], 2), shape[:1]))
        if mask == "pattern":
            patterns = empty(1, 1, *shape, dtype=torch.int32), empty(9, bm, bn // 32, dtype=torch.int32)
        return (q, q, q), (*lists, *lists, *patterns), (bm, bn, width**-0.5)

    none4, none7 = (None,) * 4, (None,) * 7
    whole, ragged = 4608, 4680  # a length of whole tiles and one that is not

    def forward(width: int, mask: str, length: int, bn: int = 128, rest: tuple = none7, flags: int = 0) -> Any:
        qkv, lists, end = operands(width, mask, length, bn)
        return KERNELS["tile_attention"](*qkv, *lists, *rest, *end, -10.0, flags)

    def backward(width: int, mask: str, length: int, scores: tuple = none4, needs: int = 7) -> Any:
        qkv, lists, end = operands(width, mask, length)
        lse = empty(BATCH, HEADS, length, dtype=torch.float32)
        return KERNELS["tile_attention_backward"](qkv[0], None, *qkv, qkv[0], lse, *lists, *scores, *end, needs)

    if dtype == torch.float32:
        yield f"{prefix} attention 64 pattern ragged", lambda: forward(64, "pattern", ragged)
        yield f"{prefix} attention backward 64 pattern", lambda: backward(64, "pattern", whole)
        return
    for width in (64, 72, 128):
        yield f"{prefix} attention {width} dense", lambda w=width: forward(w, "dense", whole)
        yield f"{prefix} attention {width} pattern", lambda w=width: forward(w, "pattern", whole)
    yield f"{prefix} attention 128 pattern ragged", lambda: forward(128, "pattern", ragged)
    yield f"{prefix} attention 256 pattern", lambda: forward(256, "pattern", whole)
    yield f"{prefix} attention 128 keep ragged", lambda: forward(128, "tiles", ragged, flags=KEEP)
    yield f"{prefix} attention 128 prune", lambda: forward(128, "tiles", whole, flags=KEEP | PRUNE)
    rows, q = empty(BATCH, HEADS, whole, dtype=torch.float32), empty(BATCH, whole, HEADS, 128)
    yield (
        f"{prefix} attention 128 prune in tiles of 384, epilogue",
        lambda: forward(128, "tiles", whole, 384, (*none4, rows, rows, q), KEEP | PRUNE),
    )
    bias = empty(1, HEADS, whole, whole)
    at = empty(1, whole, dtype=torch.int32)
    scores = (bias, empty(HEADS, 2 * whole, dtype=torch.float32), at, at)
    yield f"{prefix} attention 64 bias", lambda: forward(64, "pattern", whole, rest=(*scores, None, None, None))
    yield f"{prefix} attention backward 64 bias", lambda: backward(64, "pattern", whole, scores, 15)
    for width, length in ((64, whole), (128, ragged)):
        yield f"{prefix} attention backward {width}", lambda w=width, n=length: backward(w, "pattern", n)

    def sums() -> Any:
        (q, k, _), lists, end = operands(128, "pattern", whole)
        return KERNELS["attention_column_sums"](q, k, rows, *lists[3:], *none4, *end)

    yield f"{prefix} attention column sums 128", sums


def small_attention_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Tile lists, merged and linear attention."""
    from maskaccel.ops.attention.triton import KERNELS

    prefix = "bf16" if dtype == torch.bfloat16 else "fp32"

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if dtype == torch.bfloat16:  # integers alone
        bits, patterns = empty(1, HEADS, 80, 3, dtype=torch.int32), empty(1, 1, 80, 80, dtype=torch.int32)
        for transpose in (False, True):
            for given in (None, patterns):
                name = f"{'columns' if transpose else 'rows'}{'' if given is None else ' patterns'}"
                yield f"{prefix} lists {name}", lambda t=transpose, p=given: KERNELS["tile_lists"](bits, p, 80, t)
        scores, flags = empty(1, HEADS, 80, 80, dtype=torch.float32), empty(1, 1, 80, 80, dtype=torch.bool)
        limits = empty(1, HEADS, dtype=torch.float32)
        for rule in (0, 1, 2):
            for force, limit in ((None, None), (flags, limits)):
                args = (scores, force, force, limit, rule, 0.5, 1 if force is None else 0)
                yield (
                    f"{prefix} select {rule}{' masks' if force is not None else ''}",
                    lambda a=args: KERNELS["select_tiles"](*a),
                )
    for width in (64, 72, 128, 256):
        q, k = empty(BATCH, 1024, 8, width), empty(BATCH, 1024, 2, width)
        for alike in (False, True):
            yield (
                f"{prefix} means {width}{' alike' if alike else ''}",
                lambda q=q, a=alike: KERNELS["tile_means"](q, 128, a),
            )
        lse = empty(BATCH, 8, 1024, dtype=torch.float32)
        if width < 128:
            yield f"{prefix} merge {width}", lambda q=q, lse=lse: KERNELS["merge_attention"](q, lse, q, lse)
            yield (
                f"{prefix} merge backward {width}",
                lambda q=q, lse=lse: KERNELS["merge_attention_backward"](q, lse, q, lse, q, lse),
            )
        for feature_map in (0, 1) if width == 64 else (0,):
            name = f"{'elu1' if feature_map else 'relu'} {width}"
            yield (
                f"{prefix} linear {name}",
                lambda q=q, k=k, f=feature_map: KERNELS["linear_attention"](q, k, k, f, 0, 1e-6),
            )
            yield (
                f"{prefix} linear backward {name}",
                lambda q=q, k=k, f=feature_map: KERNELS["linear_attention_backward"](q, q, k, k, f, 0, 1e-6),
            )


def compile_part(job: tuple[int, int, int, str, int]) -> tuple[list[Compiled], list[str], int]:
    """Compile every `parts`-th case for one architecture: (results, failures, cases)."""
    arch, part, parts, only, random = job
    warnings.filterwarnings("ignore")
    from triton.runtime import driver

    from maskaccel.ops import _triton

    driver.set_active(_NoDevice(arch))  # kernels keep their binaries apart by device number, here the architecture
    results: list[Compiled] = []
    failures: list[str] = []
    seen: set[str] = set()
    current = ""

    def compile_only(kernel: Any, grid: tuple, args: tuple, options: dict) -> None:
        start = time.perf_counter()
        compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        registers, spilled = resources(compiled.asm["cubin"])
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        seconds = round(time.perf_counter() - start, 2)
        results.append(
            Compiled(arch, current, kernel.__name__, registers, spilled, shared, warps, seconds, compiled.hash)
        )

    _triton.launcher = compile_only
    count = 0
    for i, (name, call) in enumerate(cases(random)):
        if i % parts != part or only not in name:
            continue
        count += 1
        current = name
        try:
            call()
        except Exception as error:  # any failure of any stage of the compiler is a result here
            failures.append(f"sm_{arch} {name}: {type(error).__name__}: {str(error).strip()[-300:]}")
    return results, failures, count


def summary(results: list[Compiled]) -> str:
    """The worst figures of each kernel on each architecture."""
    groups: dict[tuple[str, str, int], list[Compiled]] = {}
    for r in results:
        groups.setdefault((r.kernel, r.case[:4], r.arch), []).append(r)
    head = f"{'kernel':<22}{'dtype':<7}{'arch':<8}{'variants':>8}{'warps':>7}"
    lines = [head + f"{'registers':>11}{'spill B':>9}{'shared B':>10}"]
    for (kernel, dtype, arch), found in sorted(groups.items()):
        registers = f"{min(r.registers for r in found)}-{max(r.registers for r in found)}"
        lines.append(
            f"{kernel:<22}{dtype:<7}sm_{arch:<5}{len(found):>8}{max(r.warps for r in found):>7}{registers:>11}"
            f"{max(r.spill_bytes for r in found):>9}{max(r.shared_bytes for r in found):>10}"
        )
    return "\n".join(lines)


def main() -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="compute capability as in 90; may repeat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result to FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="also N random calls of every op (none)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    args = parser.parse_args()
    archs, parts = args.arch or ARCHS, 8
    jobs = [(arch, part, parts, args.only, args.random) for arch in archs for part in range(parts)]
    results: list[Compiled] = []
    failures: list[str] = []
    known: set[str] = set()
    count = 0
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        parts_done = pool.imap_unordered(compile_part, jobs)
        for found, failed, n in tqdm(parts_done, total=len(jobs), desc="compile", unit="part"):
            results += [r for r in found if r.digest not in known]
            known.update(r.digest for r in found)
            failures += failed
            count += n
    spilling = [r for r in results if r.spill_bytes]
    print(summary(results))
    print(f"{len(results)} kernel variants of {count} calls, {len(archs)} targets, {time.perf_counter() - start:.0f} s")
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    for r in spilling:
        verdict = "SPILL" if r.spill_bytes > SPILL_LIMIT else "small spill"
        print(
            f"{verdict} sm_{r.arch} {r.kernel} ({r.case}): {r.spill_bytes} bytes, {r.registers} registers",
            file=sys.stderr,
        )
    if args.json:
        report = {"results": [asdict(r) for r in results], "failures": failures}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failures or any(r.spill_bytes > SPILL_LIMIT for r in spilling) else 0


if __name__ == "__main__":
    sys.exit(main())
