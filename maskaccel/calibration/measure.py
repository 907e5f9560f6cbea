"""Measuring a model during ordinary runs."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from ..patching.patch import Patch, patch
from .file import Calibration
from .kinds import kind_of
from .probe import Probe, blocks_of


def make_probe(kind: str, options: dict[str, Any]) -> Probe:
    """What measures a kind; ValueError if there is no such kind or option, or an option is out of range."""
    chosen = kind_of(kind)
    unknown = [name for name in options if name not in chosen.options]
    if unknown:
        allowed = ", ".join(chosen.options) or "none"
        raise ValueError(f"{unknown[0]}={options[unknown[0]]!r} is no option of kind {kind!r}; it has {allowed}")
    return chosen.probe(**options)


class Measurement:
    """A model that is looked at: a context manager around one or more runs of it. Nothing it computes changes."""

    def __init__(self, target: Any, kind: str, model: nn.Module | None, options: dict[str, Any]) -> None:
        self.kind, self.target = kind, target
        self.probe = make_probe(kind, options)
        self.probe.wanted = model
        self._patch: Patch | None = None

    def __enter__(self) -> Measurement:
        self._patch = patch(self.target, self.probe)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._patch is not None
        self._patch.remove()

    def generation(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        """A run of a loop of your own, as `Patch.generation`."""
        if self._patch is None or not self._patch.active:
            raise RuntimeError("the model is measured inside `with measure(...) as found:`")
        return self._patch.generation(*args, **kwargs)

    def result(self) -> Calibration:
        """What the runs so far gave.

        Raises:
            ValueError: No whole run was seen, or it was not enough.
        """
        values = self.probe.finish()
        assert self.probe.model is not None
        model = self.probe.model
        made = Calibration.make(self.kind, type(model).__name__, blocks_of(model), self.probe.steps, values)
        return made.checked(self.kind)


def measure(target: Any, kind: str, *, model: nn.Module | None = None, **options: Any) -> Measurement:
    """Measure what a method needs to know of a model.

    ```python
    with maskaccel.calibration.measure(pipe, "magnitudes") as found:
        pipe(prompt, num_inference_steps=28)
    found.result().save("magnitudes.json")
    ```

    Args:
        target: A pipeline or a model, not patched. A model's own loop runs inside `with found.generation(...)`.
        kind: A key of `maskaccel.calibration.KINDS`.
        model: Of a pipeline with several transformers, the one to measure.
        options: Of the kind (`KINDS[kind].options`).

    Raises:
        ValueError: There is no such kind or option.
        PatchError: On entering: the target is patched, or has nothing to measure.
    """
    return Measurement(target, kind, model, options)
