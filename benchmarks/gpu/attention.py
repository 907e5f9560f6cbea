"""Tile-skipping attention against density: cuDNN's and torch's attention, FlexAttention, our kernels.

Efficiency of a density is how much of the ideal gain is there: the time of dense cuDNN over ours, over 1 / density.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import kernels
import torch
from stage import Context, Record, Target, broken
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import TileMask

SECONDS = 120.0
EXPECTED = 6.0
DENSITIES = (1.0, 0.5, 0.25, 0.1)
# (tokens, heads, head dim): those with goals, FLUX.1's and Wan2.1-1.3B's, then about equal work at other lengths
SHAPES = (
    (16384, 24, 128), (16384, 24, 64), (16384, 24, 72), (4608, 24, 128), (32760, 12, 128),
    *((s, h, d) for s, h in ((4096, 24), (65536, 2)) for d in (64, 72, 128)),
)  # fmt: skip
TINY = ((256, 2, 64),)
BLOCK = (128, 128)
NOTE = "Gain over dense cuDNN (torch's where cuDNN does not run), in brackets its share of the ideal; losses are bold."
NEAR = 0.03  # relative distance of a bf16 result from the exact one of the same inputs
# gains over dense cuDNN by density, for head dim 128 at 16k tokens, forward and backward
GAINS = {1.0: (0.95, 0.9), 0.5: (1.9, 1.8), 0.25: (3.7, 3.5), 0.1: (9.0, 8.5)}


def _name(shape: tuple[int, int, int], direction: str) -> str:
    return f"{'x'.join(map(str, shape))} {direction}"


def _parsed(item: str) -> tuple[tuple[int, int, int], str]:
    size, direction = item.split()
    tokens, heads, width = map(int, size.split("x"))
    return (tokens, heads, width), direction


def items(context: Context) -> list[str]:
    """`TOKENSxHEADSxDIM DIRECTION`."""
    return [_name(shape, way) for shape in (TINY if context.tiny else SHAPES) for way in ("forward", "backward")]


def kept(tokens: int, heads: int, density: float, device: str) -> Tensor:
    """Tiles at random places, as many in every row: bool `(heads, rows, columns)`."""
    rows, columns = (-(-tokens // b) for b in BLOCK)
    scores = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(max(1, round(density * columns)), dim=-1).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, chosen, True).to(device)


def masked(tokens: int, heads: int, density: float, device: str) -> TileMask:
    """The same as a mask."""
    return TileMask.from_tiles(kept(tokens, heads, density, device), (tokens, tokens), BLOCK)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's choice, of `(B, S, H, Dh)`."""
    return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CuDNN's attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def leaves(shape: tuple[int, int, int], device: str) -> list[Tensor]:
    """q, k, v that want gradients, and the gradient of the output."""
    tokens, heads, width = shape
    generator = torch.Generator(device).manual_seed(0)
    made = [
        torch.randn(1, tokens, heads, width, generator=generator, device=device).to(torch.bfloat16) for _ in range(4)
    ]
    return [*(t.requires_grad_() for t in made[:3]), made[3]]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(shape: tuple[int, int, int], backend: str, device: str) -> dict[str, Attention]:
    tokens, heads, _ = shape
    found: dict[str, Attention] = {
        f"{backend} dense": lambda q, k, v: ops.tile_attention(q, k, v, backend=backend),
    }
    for density in DENSITIES:
        mask = masked(tokens, heads, density, device)
        found[f"{backend} {density}"] = lambda q, k, v, m=mask: ops.tile_attention(q, k, v, m, backend=backend)
    return found


def _flex(shape: tuple[int, int, int], device: str) -> dict[str, Attention]:
    from torch.nn.attention.flex_attention import flex_attention

    tokens, heads, _ = shape
    compiled = kernels.compiled(flex_attention, device)
    found: dict[str, Attention] = {}
    for density in DENSITIES:
        block_mask = masked(tokens, heads, density, device).to_block_mask()
        found[f"flex {density}"] = lambda q, k, v, m=block_mask: compiled(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=m
        ).transpose(1, 2)
    return found


def _one(call: Attention, made: list[Tensor], direction: str) -> Callable[[], Any]:
    """The call to be timed."""
    *inputs, dout = made
    if direction == "forward":
        inputs = [t.detach() for t in inputs]
        return lambda: call(*inputs)
    out = call(*inputs)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def exact(made: list[Tensor], head: int, tiles: Tensor, direction: str) -> tuple[Tensor, ...]:
    """Attention of one head in fp32, some rows at a time: the output, or the gradients of q, k and v."""
    q, k, v = (t[0, :, head].detach().float().requires_grad_(direction == "backward") for t in made[:3])
    dout, outs = made[3][0, :, head].float(), []
    columns = torch.arange(k.shape[0], device=k.device) // BLOCK[1]
    for start in range(0, q.shape[0], 8 * BLOCK[0]):
        rows = slice(start, start + 8 * BLOCK[0])
        keep = tiles[head, torch.arange(q.shape[0], device=q.device)[rows] // BLOCK[0]][:, columns]
        scores = (q[rows] @ k.mT * q.shape[1] ** -0.5).masked_fill(~keep, -torch.inf)
        out = scores.softmax(-1) @ v
        if direction == "forward":
            outs.append(out)
        else:
            out.backward(dout[rows])
    return (torch.cat(outs),) if outs else tuple(t.grad for t in (q, k, v) if t.grad is not None)


def warm(item: str, context: Context) -> Record:
    """Compiles FlexAttention and, where they are right, Triton's kernels."""
    shape, direction = _parsed(item)
    good, _ = kernels.usable(context, "tile_attention", "tile_attention_backward")
    calls = _ours(shape, "triton", context.device) if "triton" in good else {}
    if context.device == "cuda":
        calls |= _flex(shape, context.device)
    made = leaves(shape, context.device)
    for call in calls.values():
        _one(call, made, direction)()
    return {}


def run(item: str, context: Context) -> Record:
    """Times every provider; one that cannot run, is not checked or is wrong is named with its reason."""
    shape, direction = _parsed(item)
    device, made = context.device, leaves(shape, context.device)
    good, refused = kernels.usable(context, "tile_attention", "tile_attention_backward")
    calls: dict[str, Attention] = {"sdpa": sdpa}
    if device == "cuda":
        calls |= {"cudnn": cudnn, **_flex(shape, device)}
    for backend in good:
        calls |= _ours(shape, backend, device)
    runs, wrong, head = {}, {}, shape[1] - 1
    want = {d: exact(made, head, kept(*shape[:2], d, device), direction) for d in DENSITIES}
    for name, call in calls.items():
        try:
            one = _one(call, made, direction)
            got = one()
        except Exception as error:
            if broken(device):
                raise
            refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        tensors = [t[0, :, head] for t in (got if isinstance(got, tuple) else (got,))]
        distance = kernels.distance(tensors, want[_density(name) or 1.0])
        if distance <= NEAR:
            runs[name] = one
        else:
            ours = name.split()[0] in good
            (wrong if ours else refused)[name] = f"{distance:.2g} from exact attention, relative to its norm"
    medians = {k: statistics.median(v) for k, v in context.samples(runs, min(context.rounds, 7)).items()}
    tokens, heads, width = shape
    work = (4 if direction == "forward" else 10) * tokens * tokens * heads * width
    record: Record = {
        "tokens": tokens, "heads": heads, "head_dim": width, "direction": direction, "dtype": "bfloat16",
        "median_ms": medians, "refused": refused, "wrong": wrong,
        "dense_tflops": {name: work / ms / 1e9 for name, ms in medians.items() if not _density(name)},
    }  # fmt: skip
    peer = medians.get("cudnn", medians["sdpa"])
    record["gain"] = {name: peer / ms for name, ms in medians.items()}
    record["efficiency"] = {name: d * peer / medians[name] for name in medians if (d := _density(name))}
    if good and direction == "forward":
        record["index_ms"] = _index(shape, made, context)
    efficient = record["efficiency"]
    words = [
        f"{name} {gain:.2f}x" + (f" ({efficient[name]:.0%})" if name in efficient else "")
        for name, gain in record["gain"].items()
        if name.split()[0] in good
    ]
    return {**record, "summary": f"against dense {'cudnn' if 'cudnn' in medians else 'sdpa'}: {', '.join(words)}"}


def _density(name: str) -> float | None:
    """Of a provider with a mask that leaves something out."""
    last = name.split()[-1]
    return float(last) if last in map(str, DENSITIES) and last != "1.0" else None


def _index(shape: tuple[int, int, int], made: list[Tensor], context: Context) -> dict[str, dict[str, float]]:
    """Milliseconds to make a mask and its lists: of tiles that are known, and of tiles that are first chosen."""
    tokens, heads, _ = shape
    q, k = (t.detach() for t in made[:2])
    calls: dict[str, Callable[[], Any]] = {}
    for density in DENSITIES[1:]:
        tiles = kept(tokens, heads, density, context.device)

        def lists(tiles: Tensor = tiles) -> Any:
            return TileMask.from_tiles(tiles, (tokens, tokens), BLOCK).lists()

        def select(density: float = density) -> Any:
            scores = ops.tile_scores(ops.tile_pool(q, BLOCK[0]), ops.tile_pool(k, BLOCK[1]))
            return ops.tile_select(scores, (tokens, tokens), BLOCK, top_k=density).lists()

        calls |= {f"lists {density}": lists, f"pool, score, select, lists {density}": select}
    medians = {k: statistics.median(v) for k, v in context.samples(calls, min(context.rounds, 7)).items()}
    return {
        what: {str(density): medians[f"{what} {density}"] for density in DENSITIES[1:]}
        for what in ("lists", "pool, score, select, lists")
    }


def _best(record: Record, what: str) -> float | None:
    """The gain of the compiled kernels, or of Triton's where there are none."""
    gains = record.get("gain", {})
    return next((gains[name] for name in (f"cuda {what}", f"triton {what}") if name in gains), None)


def targets(records: dict[str, Record]) -> list[Target]:
    """Gains over dense cuDNN, and the share of building lists in what they save."""
    found = []
    for place, way in enumerate(("forward", "backward")):
        record = records.get(_name((16384, 24, 128), way), {})
        for density, goals in GAINS.items():
            what = "dense" if density == 1.0 else str(density)
            label = "dense" if density == 1.0 else f"{1 - density:.0%} skipped"
            gain = _best(record, what) if "cudnn" in record.get("median_ms", {}) else None
            found.append(Target(f"tile_attention 16384x24x128 {way}, {label}, of dense cuDNN", goals[place], gain))
    for width, peer, goal in ((64, "cudnn", 1.0), (72, "sdpa", 1.3)):
        record = records.get(_name((16384, 24, width), "forward"), {})
        times = record.get("median_ms", {})
        mine = next((times[name] for name in ("cuda dense", "triton dense") if name in times), None)
        got = times[peer] / mine if mine and peer in times else None
        found.append(Target(f"tile_attention 16384x24x{width} forward, dense, of {peer}", goal, got))
    record = records.get(_name((16384, 24, 128), "forward"), {})
    for density in DENSITIES[1:]:
        got, gain = None, _best(record, str(density))
        if gain is not None and gain > 1 and "index_ms" in record:
            peer_ms = record["median_ms"].get("cudnn", record["median_ms"]["sdpa"])
            got = record["index_ms"]["lists"][str(density)] / (peer_ms - peer_ms / gain)
        what = f"building the lists, 16384x24x128, {1 - density:.0%} skipped, of the time saved"
        found.append(Target(what, 0.02, got, "of the time saved", at_most=True))
    return found


def table(records: dict[str, Record]) -> str:
    """A line for each shape, direction and provider of ours; losing ones are marked."""
    head = ("tokens x heads x dim", "direction", "provider", "dense", *(f"{1 - d:.0%} skipped" for d in DENSITIES[1:]))
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * 4]
    for item, record in records.items():
        size, direction = item.split()
        for provider in ("cuda", "triton", "flex"):
            cells = []
            for what in ("dense", *map(str, DENSITIES[1:])):
                gain = record["gain"].get(f"{provider} {what}")
                if provider == "flex" and what == "dense":
                    gain = record["gain"].get("flex 1.0")
                density = 1.0 if what == "dense" else float(what)
                if gain is None:
                    cells.append("-")
                else:
                    share = f"{gain:.2f}x" if what == "dense" else f"{gain:.2f}x ({gain * density:.0%})"
                    cells.append(f"**{share}**" if gain < 1 else share)
            if cells != ["-"] * 4:
                lines.append(f"| {size} | {direction} | {provider} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTE])
