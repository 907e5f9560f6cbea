"""The judge of the samples: a small CNN trained on the real Fashion-MNIST images and on nothing else.

It never sees a generated image during training, so its accuracy on samples says whether they look like the class that
was asked for. Its penultimate features serve the Fréchet distance of `evaluate.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class FashionClassifier(nn.Module):
    """Five convolutions with batch norm, 280 k parameters.

    The images of the data set are 28x28 and only padded to 32x32, so the network reads 28x28 windows: the middle one at
    test time, a random one during training (the augmentation by shifts).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 32, kernel=4, stride=2),
            _conv(32, 64),
            _conv(64, 64),
            nn.MaxPool2d(2),
            _conv(64, 128),
            _conv(128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The 128 penultimate features of images `(n, 1, 32, 32)` or `(n, 1, 28, 28)` in -1..1."""
        if images.ndim != 4 or images.shape[1] != 1 or tuple(images.shape[2:]) not in ((32, 32), (28, 28)):
            raise ValueError(f"images must be (n, 1, 32, 32) or (n, 1, 28, 28) in -1..1, got {tuple(images.shape)}")
        if images.shape[-1] == 32:
            images = images[..., 2:-2, 2:-2]
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits `(n, 10)`."""
        return self.head(self.features(images))

    @torch.inference_mode()
    def judge(self, images: torch.Tensor, batch: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """Predicted classes `(n,)` and penultimate features `(n, 128)`, computed in batches."""
        classes, features = [], []
        for chunk in images.split(batch):
            feature = self.features(chunk)
            features.append(feature)
            classes.append(self.head(feature).argmax(1))
        if not classes:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, self.head.in_features)
        return torch.cat(classes), torch.cat(features)


def save_classifier(model: FashionClassifier, path: str | Path, facts: dict[str, float | int | str]) -> None:
    """Write the weights, with `facts` (test accuracy, epochs, seed, ...) as JSON in the file's metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"facts": json.dumps(facts, sort_keys=True)})


def load_classifier(path: str | Path = WEIGHTS) -> tuple[FashionClassifier, dict[str, float | int | str]]:
    """Read the classifier in eval mode, and the facts stored with it.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train it with `python examples/fashion/train_classifier.py`")
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
    model = FashionClassifier()
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False), facts
