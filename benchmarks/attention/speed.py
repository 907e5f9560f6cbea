"""Speed of `tile_attention` against the share of tiles kept, beside torch's attention and FlexAttention.

All providers of a case run in turn, round after round; the table has medians. A provider runs only after its result was
compared with the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskaccel import ops
from maskaccel.bench.attention import tiles
from maskaccel.bench.fingerprint import fingerprint
from maskaccel.masks import TileMask

from ..interleaved import timed
from . import page

HEADS = ((8, 64), (4, 128), (8, 72))
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.09375, 0.046875)
FLEX_DENSITIES = (1.0, 0.5, 0.25, 0.09375)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], Any]


def measure(tokens: int, rounds: int, *, flex: bool = True, backward: bool = True) -> dict[str, Any]:
    """All cases.

    Args:
        tokens: Length of the sequence.
        rounds: Samples of each provider.
        flex: Whether FlexAttention is measured, which compiles for a minute or two.
        backward: Whether the backward is measured.

    Returns:
        Plain data for JSON.
    """
    cases = [(name, *shape) for name in DTYPES for shape in HEADS]
    found: list[dict[str, Any]] = []
    for name, heads, width in tqdm(cases, desc="attention", unit="case"):
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(1, tokens, heads, width, generator=generator).to(DTYPES[name]) for _ in range(3)]
        masks = {density: tiles(tokens, heads, density) for density in DENSITIES}
        head = {"dtype": name, "heads": heads, "head_dim": width, "tokens": tokens}
        with torch.no_grad():
            found.append(head | {"direction": "forward", "seconds": timed(_forwards(qkv, masks, flex), rounds)})
        if backward:
            found.append(head | {"direction": "backward", "seconds": timed(_backwards(qkv, masks), rounds)})
    return {"fingerprint": fingerprint(), "block": 64, "rounds": rounds, "cases": found}


def _forwards(qkv: list[Tensor], masks: dict[float, TileMask], flex: bool) -> dict[str, Call]:
    q, k, v = qkv
    heads_first = [t.transpose(1, 2).contiguous() for t in qkv]
    calls: dict[str, Call] = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first)}
    calls["dense"] = lambda: ops.tile_attention(q, k, v)
    for density, mask in masks.items():
        mask.lists()
        calls[f"tiles {density}"] = lambda mask=mask: ops.tile_attention(q, k, v, mask)
        _compare(calls[f"tiles {density}"](), qkv, mask)
    if flex:
        calls |= _flex(heads_first, masks)
    return calls


def _flex(heads_first: list[Tensor], masks: dict[float, TileMask]) -> dict[str, Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, calls = torch.compile(flex_attention, dynamic=False), {}
    tokens, heads = heads_first[0].shape[2], heads_first[0].shape[1]

    def looking_at(kept: Tensor) -> Callable[..., Tensor]:
        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return kept[h, i // 64, j // 64]

        return rule

    for density, mask in masks.items():
        if density not in FLEX_DENSITIES:
            continue
        rule = looking_at(mask.tiles()[0])
        block_mask = create_block_mask(rule, None, heads, tokens, tokens, device="cpu", BLOCK_SIZE=64)
        call = lambda block_mask=block_mask: compiled(*heads_first, block_mask=block_mask)  # noqa: E731
        try:
            call()
        except Exception as error:
            tqdm.write(f"FlexAttention at density {density}: {type(error).__name__}: {str(error)[:200]}")
            break
        calls[f"flex {density}"] = call
    return calls


def _backwards(qkv: list[Tensor], masks: dict[float, TileMask]) -> dict[str, Call]:
    """Calls of the backward alone; the graph of each was made once."""
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(qkv[0].dtype)

    def backward(run: Callable[..., Tensor], layout: Callable[[Tensor], Tensor]) -> Call:
        leaves = [layout(t).detach().clone().requires_grad_() for t in qkv]
        out = run(*leaves)
        dout = layout(grad).contiguous()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    heads_first = lambda t: t.transpose(1, 2).contiguous()  # noqa: E731
    calls = {"sdpa": backward(torch.nn.functional.scaled_dot_product_attention, heads_first)}
    calls["dense"] = backward(ops.tile_attention, torch.clone)
    for density, mask in masks.items():
        calls[f"tiles {density}"] = backward(lambda q, k, v, m=mask: ops.tile_attention(q, k, v, m), torch.clone)
    return calls


def _compare(got: Tensor, qkv: list[Tensor], mask: TileMask) -> None:
    """RuntimeError if the result is wrong: one head against fp64, beside torch in the same dtype."""
    q, k, v = (t[:, :, :1].transpose(1, 2) for t in qkv)
    kept = mask.to_bool()[:, :1]
    attention = torch.nn.functional.scaled_dot_product_attention
    truth = attention(q.double(), k.double(), v.double(), attn_mask=kept)
    mine, theirs = (
        (out.double() - truth).square().mean().sqrt().item()
        for out in (got[:, :, :1].transpose(1, 2), attention(q, k, v, attn_mask=kept))
    )
    if mine > 2 * theirs + 1e-9:
        raise RuntimeError(f"the result is off: error {mine:.2e}, torch's {theirs:.2e}")


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown: milliseconds of torch, and how many times faster the others are."""
    columns = [1.0, 0.5, 0.25, 0.09375]
    lines = [
        "| direction | dtype | heads x dim | torch, ms | dense | "
        + " | ".join(f"{1 - d:.1%} skipped (ideal {1 / d:.3g}x)" for d in columns[1:])
        + " | of ideal at 75 % | FlexAttention dense / 75 % / 90.6 % |",
        "|---" * (len(columns) + 6) + "|",
    ]
    for case in data["cases"]:
        s = case["seconds"]
        ours = [f"{s['sdpa'] / s['dense']:.2f}x", *(f"{s['sdpa'] / s[f'tiles {d}']:.2f}x" for d in columns[1:])]
        flex = [f"{s['sdpa'] / s[f'flex {d}']:.2f}x" if f"flex {d}" in s else "-" for d in (1.0, 0.25, 0.09375)]
        ideal = s["dense"] / s["tiles 0.25"] / 4
        lines.append(
            f"| {case['direction']} | {case['dtype']} | {case['heads']} x {case['head_dim']} | {1e3 * s['sdpa']:.0f} | "
            f"{' | '.join(ours)} | {ideal:.0%} | {' / '.join(flex) if case['direction'] == 'forward' else 'none'} |"
        )
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any], path: Path) -> None:
    """Speed-up over torch's dense attention against the share of tiles kept, one panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), dpi=110, sharey=True)
    for ax, dtype in zip(axes, DTYPES, strict=True):
        cases = [c for c in data["cases"] if c["dtype"] == dtype and c["direction"] == "forward"]
        ax.plot(DENSITIES, [1 / d for d in DENSITIES], "k--", linewidth=1, label="torch SDPA, if skipping were free")
        ax.axhline(1, color="k", linewidth=1, label="torch SDPA, dense")
        for color, case in zip(("C0", "C1", "C2"), cases, strict=True):
            s = case["seconds"]
            label = f"head dim {case['head_dim']}"
            ax.plot(DENSITIES, [s["sdpa"] / s[f"tiles {d}"] for d in DENSITIES], "o-", color=color, label=label)
            flex = [d for d in DENSITIES if f"flex {d}" in s]
            if flex:
                speed = [s["sdpa"] / s[f"flex {d}"] for d in flex]
                ax.plot(flex, speed, "x:", color=color, label=f"FlexAttention, {label}")
        ax.set(xscale="log", yscale="log", xlabel="share of tiles kept", title=f"{dtype}, forward")
        ax.set_xticks(DENSITIES, [f"{d:.0%}" if d >= 0.2 else f"{d:.1%}" for d in DENSITIES], fontsize=7)
        ax.set_yticks([0.5, 1, 2, 4, 8, 16, 32, 64], ["0.5x", "1x", "2x", "4x", "8x", "16x", "32x", "64x"])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("speed-up over dense torch SDPA")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def run(tokens: int, rounds: int, out: Path, docs: Path, *, flex: bool) -> None:
    """Measure, and write `attention_cpu.json`, the table of the page and its picture."""
    data = measure(tokens, rounds, flex=flex)
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention_cpu.json").write_text(json.dumps(data, indent=1) + "\n")
    page.update(docs / "attention-speed.md", "speed", table(data))
    draw(data, docs / "attention-speed.png")
    print(table(data))
