"""The curve: speed-up across, PSNR up; a colour for each method of ours, other libraries in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row, speed

_GREY_MARKS = "osD^vP*X<>"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of `report.collect` into a PNG file.

    A line joins the settings of one method. The x axis is the measured speed-up, or 1 / compute as long as no row has a
    timing; a row without one is then left out. A hollow mark is a run together with an exact method.

    Raises:
        ImportError: matplotlib is not installed (`requirements/bench.txt`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = any("timing" in row for row in rows)
    rows = [row for row in rows if "timing" in row or not timed]
    figure, axes = plt.subplots(figsize=(11, 7), dpi=110)
    grouped: dict[tuple[bool, str, bool], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["peer"], row["family"], "+" in row["run"]), []).append(row)
    ours = sorted({name for peer, name, _ in grouped if not peer})
    palette: Any = plt.get_cmap("tab20" if len(ours) > 10 else "tab10")
    peers = sorted({name for peer, name, _ in grouped if peer})
    for (peer, name, combined), group in sorted(grouped.items()):
        group = sorted(group, key=lambda row: speed(row, timed=timed))
        xs = [speed(row, timed=timed) for row in group]
        ys = [row["psnr_db"]["mean"] for row in group]
        color = "#888888" if peer else palette(ours.index(name))
        axes.plot(
            xs, ys, color=color, linewidth=0.8 if peer else 1.4, linestyle="--" if peer else "-",
            marker=_GREY_MARKS[peers.index(name) % len(_GREY_MARKS)] if peer else "o", markersize=5 if peer else 6,
            markerfacecolor="white" if combined else color, zorder=1 if peer else 2,
            label=name + (" + FusedAdaLN" if combined else ""),
        )  # fmt: skip
        axes.annotate(name, (xs[-1], ys[-1]), xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
    axes.set_xlabel("speed-up" if timed else "1 / compute (no timings yet)")
    axes.set_ylabel("PSNR to the unaccelerated image, dB (mean)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
