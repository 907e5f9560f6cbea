"""Fashion-MNIST as 32x32 tensors, read from the IDX files that Debian's `dataset-fashion-mnist` installs."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch

DEFAULT_ROOT = Path(os.environ.get("MASKACCEL_FASHION_DATA") or "/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL_CLASS = len(CLASSES)  # the row of the label table that means "no class" (classifier-free guidance)


def _read_idx(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: install the data with `apt-get install dataset-fashion-mnist`, "
            "or pass the folder that holds the four Fashion-MNIST .gz files."
        )
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(tuple(int(n) for n in shape))


def load_split(split: str, root: str | Path = DEFAULT_ROOT) -> tuple[torch.Tensor, torch.Tensor]:
    """Load one split.

    Args:
        split: `"train"` (60,000 images) or `"test"` (10,000).
        root: Folder of the `.gz` IDX files.

    Returns:
        images: uint8 `(n, 1, 32, 32)`, the 28x28 originals padded with black.
        labels: int64 `(n,)`, 0 to 9.

    Raises:
        FileNotFoundError: The data are not installed.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = torch.from_numpy(_read_idx(Path(root) / f"{prefix}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(_read_idx(Path(root) / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64))
    return torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None], labels


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 to float32 in -1..1."""
    return images.float() / 127.5 - 1.0
