"""The options of a training run, and its command line."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import networks
import parallel
import torch

METHODS = ("none", "tread", "sprint", "mdt", "maskdit", "microdit")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """A run. Every field is an option of the command line."""

    folder: Path
    data: Path | None = None
    eval_data: Path | None = None
    network: str = "sit"
    method: str = "none"
    size: int = 32
    channels: int = 3
    patch: int = 2
    width: int = 192
    depth: int = 8
    heads: int = 6
    rope: bool = False
    steps: int = 1000
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 50
    cooldown: float = 0.35
    ema: float = 0.998
    label_drop: float = 0.1
    dense_share: float = 0.0
    flip: bool = False
    seed: int = 0
    dtype: str = "fp32"
    compile: bool = False
    resident: bool = False
    parallel: str = "ddp"
    device: str | None = None
    resume: bool = False
    log_every: int = 25
    save_every: int = 200
    eval_every: int = 0
    eval_images: int = 256
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("network", networks.KINDS),
            ("method", METHODS),
            ("dtype", tuple(DTYPES)),
            ("parallel", parallel.KINDS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name in (
            "size",
            "patch",
            "width",
            "depth",
            "heads",
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if not 0 <= self.dense_share <= 1:
            raise ValueError(f"dense_share={self.dense_share} must lie in [0, 1]")
        if not 0 <= self.label_drop < 1 or not 0 <= self.ema < 1 or not 0 <= self.cooldown <= 1:
            raise ValueError(
                f"label_drop={self.label_drop}, ema={self.ema} must lie in [0, 1), cooldown={self.cooldown} in [0, 1]"
            )

    @property
    def dense_from(self) -> int:
        """The step from which nothing is dropped any more."""
        return round(self.steps * (1 - self.dense_share))


# What a run may change when it goes on; all else decides what it computes.
_FREE = {"folder", "data", "eval_data", "steps", "compile", "parallel", "device", "resume", "accumulate"}
_FREE |= {"log_every", "save_every", "eval_every", "eval_images", "snapshot_every"}


def kept(options: Options) -> dict[str, Any]:
    """The options that a resumed run may not change."""
    return {name: value for name, value in asdict(options).items() if name not in _FREE}


def parse(arguments: list[str] | None = None, description: str | None = None) -> Options:
    """The options that a command line gives."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"str | None": str, "Path": Path, "Path | None": Path, "int": int, "float": float, "str": str}
    choices = {"network": networks.KINDS, "method": METHODS, "dtype": tuple(DTYPES), "parallel": parallel.KINDS}
    for field in fields(Options):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", help=HELP.get(field.name))
            continue
        default = None if field.name == "folder" else field.default
        parser.add_argument(
            flag,
            type=kinds[str(field.type)],
            default=default,
            required=field.name == "folder",
            choices=choices.get(field.name),
            help=f"{HELP.get(field.name, '')} (default: {default})",
        )
    return Options(**vars(parser.parse_args(arguments)))


HELP = {
    "folder": "where the run is kept",
    "data": "folder with a sub-folder of images for each class, or of the Fashion-MNIST files",
    "eval_data": "folder like that of --data, for --eval-every",
    "method": "how tokens are dropped",
    "network": "sit is the module beside this script, dit is that of diffusers",
    "size": "pixels of a side",
    "channels": "of images from a folder, 3 or 1",
    "patch": "pixels of a side of a patch",
    "width": "channels of a token",
    "depth": "transformer blocks",
    "heads": "attention heads",
    "rope": "rotary positions (sit)",
    "batch": "samples of a step, all ranks together",
    "accumulate": "parts that a rank's share of the batch is cut into",
    "warmup": "steps over which the learning rate rises",
    "cooldown": "share of the steps over which the learning rate decays",
    "ema": "weight of the past in the averaged weights",
    "label_drop": "share of labels that are dropped",
    "dense_share": "share of the steps at the end in which nothing is dropped",
    "flip": "mirror half of the images",
    "dtype": "bf16 computes in bfloat16 where autocast does; weights stay fp32",
    "compile": "torch.compile the blocks",
    "resident": "keep all images on the device and draw there what is random: for GPUs",
    "parallel": "how several ranks share the work",
    "device": "cpu or cuda",
    "resume": "go on from the run's checkpoint",
    "eval_every": "steps between losses of the averaged weights on held-out images, 0: never",
    "eval_images": "held-out images",
    "snapshot_every": "steps between files of the averaged weights, 0: never",
}
