"""Where training images come from, and what is drawn for each sample.

Everything random about a sample (which image, flip, time, noise, whether its label is dropped) follows from the seed
and the number of the sample among all of the run: sample i of step s has number s * batch + i. So a run sees the same
samples on any number of ranks, and a resumed run goes on with those that an uninterrupted one would see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FASHION = Path(__file__).resolve().parents[1] / "fashion"
sys.path.append(str(FASHION))
from data import CLASSES, load_split, to_float  # noqa: E402  of the example model beside this one

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Images:
    """What a network has to know of its images.

    Attributes:
        size: Pixels of a side.
        channels: 1 or 3.
        classes: Names of the classes.
    """

    size: int
    channels: int
    classes: tuple[str, ...]

    @classmethod
    def of(cls, source: Source) -> Images:
        """Of a source."""
        return cls(source.size, source.channels, tuple(source.classes))


class FashionImages:
    """Fashion-MNIST as grey images, all in memory.

    Args:
        root: Folder of the `.gz` files.
        split: `"train"` or `"test"`.
        size: Pixels of a side; above 32 the images are upsampled (bilinear).

    Raises:
        ValueError: `size` is below 32.
    """

    channels = 1

    def __init__(self, root: str | Path, split: str = "train", size: int = 32) -> None:
        if size < 32:
            raise ValueError(f"size={size}: Fashion-MNIST has 32 pixels a side, and is upsampled, not shrunk")
        self.size, self.classes = size, CLASSES
        self._images, self.labels = load_split(split, root)
        if size > 32:
            self._images = torch.cat([_upsampled(part, size) for part in self._images.split(4096)])

    def __len__(self) -> int:
        return len(self._images)

    def load(self, indices: Sequence[int]) -> Tensor:
        """uint8 `(n, 1, size, size)`."""
        return self._images[list(indices)]


def _upsampled(images: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(images.float(), size=(size, size), mode="bilinear").round().byte()


class FolderImages:
    """A folder with one sub-folder of images for each class; files are decoded when they are asked for.

    An image is resized so that its shorter side has `size` pixels, and its middle is cut out.

    Args:
        root: The folder.
        size: Pixels of a side.
        channels: 3 (RGB) or 1 (grey).

    Raises:
        FileNotFoundError: There is no such folder, or no image in its sub-folders.
        ValueError: Another number of channels.
    """

    def __init__(self, root: str | Path, size: int, channels: int = 3) -> None:
        root = Path(root)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}; allowed are 1 and 3")
        if not root.is_dir():
            raise FileNotFoundError(f"the image folder {root} does not exist")
        self.size, self.channels = size, channels
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        found = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGES
        ]
        if not found:
            raise FileNotFoundError(f"{root} has no images in sub-folders, one for each class ({', '.join(IMAGES)})")
        self.classes: Sequence[str] = tuple(folder.name for folder in folders)
        self.paths = [path for path, _ in found]
        self.labels = torch.tensor([label for _, label in found])

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int]) -> Tensor:
        """uint8 `(n, channels, size, size)`."""
        return torch.stack([self._decode(self.paths[i]) for i in indices])

    def _decode(self, path: Path) -> Tensor:
        with Image.open(path) as file:
            image = file.convert("RGB" if self.channels == 3 else "L")
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(pixels.reshape(self.size, self.size, self.channels).copy()).permute(2, 0, 1)


Source = FashionImages | FolderImages


@dataclass(frozen=True)
class Batch:
    """Samples of one step; B of them, numbered `first` to `first + B - 1`.

    Attributes:
        images: fp32 `(B, C, H, W)` in -1..1.
        labels: int64 `(B,)`; the number of classes where the label was dropped.
        times: fp32 `(B,)` in 0..1; 1 is noise.
        noise: fp32, shaped as the images.
        step: The optimiser step that they belong to.
        first: Number of the first sample within the step's batch, among all ranks.
    """

    images: Tensor
    labels: Tensor
    times: Tensor
    noise: Tensor
    step: int
    first: int

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` runs of samples, as even as they can be."""
        cuts = [len(self.labels) * i // parts for i in range(parts + 1)]
        return [self._part(slice(a, b)) for a, b in pairwise(cuts)]

    def _part(self, samples: slice) -> Batch:
        tensors = (getattr(self, name)[samples] for name in ("images", "labels", "times", "noise"))
        return Batch(*tensors, self.step, self.first + samples.start)

    def pinned(self) -> Batch:
        """The same in memory that a device copies from while others wait for nothing."""
        return Batch(**{f.name: v.pin_memory() if isinstance(v := getattr(self, f.name), Tensor) else v
                        for f in fields(self)})  # fmt: skip

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in moved.items()})


def random_numbers(seed: int, purpose: int, item: int) -> np.random.Generator:
    """Numbers that follow from three integers alone (Philox; a counter, so nothing has to be drawn before)."""
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, item, 0, 0], dtype=np.uint64)))


_ORDER, _SAMPLE, _HELD_OUT = 0, 1, 2  # purposes


@dataclass(frozen=True)
class Draws:
    """The samples of a run.

    Attributes:
        source: The images.
        batch: Samples of a step, all ranks together.
        seed: The run's seed.
        label_drop: Share of samples whose label is dropped, for classifier-free guidance.
        flip: Whether half of the images are mirrored.
    """

    source: Source
    batch: int
    seed: int
    label_drop: float = 0.1
    flip: bool = False

    def step(self, step: int, first: int, count: int) -> Batch:
        """Samples `first` to `first + count - 1` of the batch of a step.

        Images are visited in epochs: each once before any comes again.
        """
        shape = (self.source.channels, self.source.size, self.source.size)
        numbers = range(step * self.batch + first, step * self.batch + first + count)
        picks = [self._image(number) for number in numbers]
        images, labels = to_float(self.source.load(picks)), self.source.labels[picks].clone()
        times, noise = torch.empty(count), torch.empty(count, *shape)
        for i, number in enumerate(numbers):
            draw = random_numbers(self.seed, _SAMPLE, number)
            drop, mirror = draw.random(2)
            times[i] = draw.standard_normal()
            noise[i] = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
            if drop < self.label_drop:
                labels[i] = len(self.source.classes)
            if self.flip and mirror < 0.5:
                images[i] = images[i].flip(-1)
        return Batch(images, labels, times.sigmoid(), noise, step, first)

    def _image(self, number: int) -> int:
        epoch, place = divmod(number, len(self.source))
        return int(_order(self.seed, epoch, len(self.source))[place])


class ResidentDraws:
    """The samples of a run, drawn on the device that trains: all images are kept there, and no step waits for the host.

    What is drawn follows from the seed and the step, so it is the same on any number of ranks and after a resumption,
    but other on another kind of device, and other than what `Draws` gives.

    Args:
        source: The images.
        batch: Samples of a step, all ranks together.
        seed: The run's seed.
        label_drop: As in `Draws`.
        flip: As in `Draws`.
        device: Where everything is.
    """

    def __init__(
        self, source: Source, batch: int, seed: int, label_drop: float, flip: bool, device: torch.device
    ) -> None:
        self.batch, self.seed, self.label_drop, self.flip, self.device = batch, seed, label_drop, flip, device
        self._images = source.load(range(len(source))).to(device)
        self._labels, self._classes = source.labels.to(device), len(source.classes)
        self._generator = torch.Generator(device)
        self._orders: dict[int, Tensor] = {}

    def step(self, step: int, first: int, count: int) -> Batch:
        """As `Draws.step`."""
        generator = self._seeded(_SAMPLE, step)
        # Of the whole batch, whoever takes which part of it.
        drop, mirror = torch.rand(2, self.batch, generator=generator, device=self.device)
        times = torch.randn(self.batch, generator=generator, device=self.device).sigmoid()
        noise = torch.randn(self.batch, *self._images.shape[1:], generator=generator, device=self.device)
        part = slice(first, first + count)
        picks = self._picks(step * self.batch + first, count)
        images, labels = to_float(self._images[picks]), self._labels[picks]
        labels = torch.where(drop[part] < self.label_drop, self._classes, labels)
        if self.flip:
            images = torch.where((mirror[part] < 0.5)[:, None, None, None], images.flip(-1), images)
        return Batch(images, labels, times[part], noise[part], step, first)

    def _seeded(self, purpose: int, item: int) -> torch.Generator:
        numbers = random_numbers(self.seed, purpose, item)
        return self._generator.manual_seed(int(numbers.integers(2**62)))

    def _picks(self, number: int, count: int) -> Tensor:
        """Which images samples `number` to `number + count - 1` of the run are; every epoch sees each once."""
        parts, total = [], len(self._labels)
        while count:
            epoch, place = divmod(number, total)
            taken = min(count, total - place)
            if epoch not in self._orders:
                order = torch.randperm(total, generator=self._seeded(_ORDER, epoch), device=self.device)
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
            parts.append(self._orders[epoch][place : place + taken])
            number, count = number + taken, count - taken
        return torch.cat(parts)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return random_numbers(seed, _ORDER, epoch).permutation(count)


def held_out(source: Source, count: int, seed: int = 0) -> Batch:
    """A fixed batch to judge by: `count` images that are spread over the source, times evenly spread over 0..1."""
    picks = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
    shape = (source.channels, source.size, source.size)
    noise = [random_numbers(seed, _HELD_OUT, i).standard_normal(shape, dtype=np.float32) for i in range(len(picks))]
    times = (torch.arange(len(picks)) + 0.5) / len(picks)
    # Neighbours in the source are often alike, so times are dealt out in an order of their own.
    times = times[torch.from_numpy(random_numbers(seed, _HELD_OUT, len(picks)).permutation(len(picks)))]
    images = to_float(source.load(picks))
    return Batch(images, source.labels[picks].clone(), times, torch.from_numpy(np.stack(noise)), 0, 0)


def prefetched(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """`make(start)` ... `make(stop - 1)`, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, start) if start < stop else None
        for step in range(start, stop):
            batch = coming.result()
            coming = thread.submit(make, step + 1) if step + 1 < stop else None
            yield batch
