"""The output folder: one JSON line a run and kind of measurement, images beside it, all of one setting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from maskaccel.bench.fingerprint import PACKAGES, fingerprint, versions

from .model import Setting
from .runs import slug


class Store:
    """A folder that holds finished work, so that a later call continues where an earlier one stopped.

    Args:
        folder: Made if it is not there.
        setting: What all its runs share.

    Raises:
        ValueError: The folder holds runs of another setting.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "setting.json"
        if path.exists() and (held := json.loads(path.read_text())) != setting.as_dict():
            changed = ", ".join(f"{k}={held.get(k)!r}" for k, v in setting.as_dict().items() if held.get(k) != v)
            raise ValueError(f"--out {folder} holds runs with {changed}: give the same options or another folder")
        path.write_text(json.dumps(setting.as_dict()) + "\n")

    def path(self, text: str, kind: str) -> Path:
        """File of a run: kind is `"quality.json"`, `"timing.json"` or `"images.safetensors"`."""
        return self.folder / f"{slug(text)}.{kind}"

    def read(self, text: str, kind: str) -> dict[str, Any] | None:
        """A finished result, or None."""
        path = self.path(text, kind)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, text: str, kind: str, row: dict[str, Any]) -> None:
        """Write a result; a reader sees all of it or nothing."""
        path = self.path(text, kind)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(row) + "\n")
        part.replace(path)

    def write_images(self, text: str, images: torch.Tensor) -> torch.Tensor:
        """Store images in 0..1 as bytes; returns them as they will be read."""
        save_file({"images": (images * 255).round().byte().contiguous()}, self.path(text, "images.safetensors"))
        return self.images(text)

    def images(self, text: str) -> torch.Tensor:
        """Stored images in 0..1."""
        return load_file(self.path(text, "images.safetensors"))["images"].float() / 255


def where() -> dict[str, Any]:
    """Machine, versions, commit and how busy the machine was."""
    mark = fingerprint()
    mark["versions"] = versions((*PACKAGES, "cache-dit"))
    return {**mark, "load_average": [round(value, 2) for value in os.getloadavg()]}
