"""The picture of the demonstration: rows of samples under each other, one seed a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image


def draw(
    rows: Sequence[tuple[str, str, torch.Tensor]], names: Sequence[str], title: str, footer: str, scale: int = 4
) -> Image.Image:
    """Draw rows of images under each other, the same seed in the same column.

    Args:
        rows: Of each row its name, a line of figures, and images `(n, 1, h, w)` in 0..1.
        names: The heading of each column.
        title: The line above.
        footer: The line below.
        scale: Enlargement of each pixel.

    Returns:
        The picture, RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    count = len(names)
    height, width = (scale * side for side in rows[0][2].shape[-2:])
    left, top, gap, line = 210, 78, 6, 26
    size = (left + count * (width + gap) + gap, top + len(rows) * (height + gap) + line + 18)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    big, small = ImageFont.load_default(size=20), ImageFont.load_default(size=15)
    pen.text((12, 12), title, "black", font=big)
    for column, name in enumerate(names):
        pen.text((left + column * (width + gap) + width // 2, top - 8), name, "black", font=small, anchor="ms")
    for row, (name, figures, images) in enumerate(rows):
        y = top + row * (height + gap)
        pen.text((12, y + height // 2 - 30), name, "black", font=big)
        pen.multiline_text((12, y + height // 2 - 4), figures, "#444444", font=small, spacing=5)
        for column in range(count):
            pixels = (images[column, 0].clamp(0, 1) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels, mode="L").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (width + gap), y))
    pen.text((12, size[1] - line - 6), footer, "#444444", font=small)
    return canvas
