"""`maskaccel.patch`: apply methods to a model or pipeline as one reversible transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..ops._backends import KERNEL_DTYPES, select
from ..state.generation import Generation, track
from .report import PatchReport
from .targets import find_models
from .transaction import PatchError, Transaction

OWNER = "_maskaccel_patch"


class Method(Protocol):
    """What `patch` asks of a method: a hashable recipe that plans edits and later tells what it did."""

    @property
    def name(self) -> str: ...

    def attach(self, context: Context) -> None:
        """Plan edits through `context`; raise PatchError if the method cannot work on the model."""

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """What the method did on a patched model since the patch, for the report."""


class Context:
    """What a method sees of one model while it plans its edits."""

    def __init__(self, model: nn.Module, transaction: Transaction, report: PatchReport, generation: Generation) -> None:
        self.model, self.transaction, self.report, self.generation = model, transaction, report, generation
        self.planned = 0
        self._tracked = False

    def done(self, method: str, module: Any, action: str) -> None:
        """Count a patched site."""
        self.planned += 1
        self.report.sites[method, type(module).__name__, action] += 1

    def skip(self, method: str, module: Any, reason: str) -> None:
        """Count a site that stays as it is, and why."""
        self.report.skipped[method, type(module).__name__, reason] += 1

    def track_generation(self, method: str) -> Generation:
        """The model's generation, advanced by the model's own calls from now on."""
        if not self._tracked:
            track(self.model, self.generation, self.transaction, method)
            self._tracked = True
        return self.generation


class Patch:
    """A patched target. Use it as a context manager, or call `remove()`."""

    def __init__(self, target: Any, methods: tuple[Method, ...], models: list[nn.Module], transaction: Transaction,
                 report: PatchReport, generations: list[Generation]) -> None:  # fmt: skip
        self.target, self.methods, self.models = target, methods, models
        self._transaction, self._report, self._generations = transaction, report, generations
        self.active = True

    def report(self) -> PatchReport:
        """What was patched, on which backend, what was left and why, and what the methods did since."""
        for method in self.methods:
            totals: dict[str, Any] = {}
            for model in self.models:
                for key, value in method.activity(model).items():
                    totals[key] = totals[key] + value if isinstance(totals.get(key), int | float) else value
            self._report.activity[method.name] = totals
        return self._report

    def remove(self) -> None:
        """Restore the target exactly. Calling it again does nothing."""
        if not self.active:
            return
        self._report.notes += self._transaction.undo()
        self.active = False

    @contextlib.contextmanager
    def generation(self, num_steps: int | None = None) -> Iterator[Generation]:
        """One denoising run of a loop of your own (a pipeline does this by itself).

        Call `step()` of the yielded object after each step. A model that runs several times a step, once per guidance branch,
        names the branch: `with run.branch("cond"):`.

        Args:
            num_steps: Steps of the run, if known.

        Raises:
            ValueError: `num_steps` is below 1.
        """
        for one in self._generations:
            one.begin(num_steps)
        try:
            yield GenerationGroup(self._generations)
        finally:
            for one in self._generations:
                one.end()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        names = ", ".join(method.name for method in self.methods)
        return f"Patch([{names}] on {type(self.target).__name__}, {'active' if self.active else 'removed'})"


class GenerationGroup(Generation):
    """The generations of all models of a target, moved together."""

    def __init__(self, members: list[Generation]) -> None:
        super().__init__()
        self._members = members

    def step(self) -> None:
        for one in self._members:
            one.step()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in self._members:
                stack.enter_context(one.branch(name))
            yield


def patch(target: Any, methods: Method | Sequence[Method] | None = None) -> Patch:
    """Patch a pipeline or model in place, as one transaction: all of it, or nothing.

    Args:
        target: A diffusers pipeline (every transformer in it is patched), or any `nn.Module`.
        methods: What to apply, such as `[methods.FORA(interval=3), methods.FusedAdaLN()]`. None is `FusedAdaLN()`.

    Returns:
        The patch, with `report()`, `remove()`, `generation()`; also a context manager. Patching again with the same methods
        returns the patch that is there.

    Raises:
        TypeError: `methods` holds something that is no method.
        PatchError: The target is patched with other methods, a method matches nothing in it, or two methods want one site.
            The target is unchanged.
    """
    chosen = _as_methods(methods)
    models, pipeline = find_models(target)
    for model in models:
        held = model.__dict__.get(OWNER)
        if held is not None and held.active:
            if held.methods == chosen and held.target is target:
                return held
            names = ", ".join(method.name for method in held.methods)
            raise PatchError(f"{type(model).__name__} is already patched with [{names}]; call remove() of that patch first")

    transaction, report = Transaction(), PatchReport()
    generations = [Generation() for _ in models]
    contexts = [Context(m, transaction, report, g) for m, g in zip(models, generations, strict=True)]
    for method in chosen:
        before = sum(context.planned for context in contexts)
        for context in contexts:
            method.attach(context)
        if sum(context.planned for context in contexts) == before:
            raise PatchError(_nothing_matched(method, models, report))
    report.models = [type(model).__name__ for model in models]
    report.backend = _backend_of(models[0])
    if pipeline is not None and any(context._tracked for context in contexts):
        from ..state.generation import follow_scheduler

        follow_scheduler(pipeline, generations, transaction)
    result = Patch(target, chosen, models, transaction, report, generations)
    for model in models:
        transaction.set(model, OWNER, result, "maskaccel")
    transaction.commit()
    return result


def _as_methods(methods: Method | Sequence[Method] | None) -> tuple[Method, ...]:
    if methods is None:
        from ..methods import FusedAdaLN

        return (FusedAdaLN(),)
    chosen = tuple(methods) if isinstance(methods, list | tuple) else (methods,)
    if not chosen:
        raise TypeError("methods is empty; pass at least one method, such as methods.FusedAdaLN()")
    for method in chosen:
        if isinstance(method, type) or not hasattr(method, "attach"):
            raise TypeError(f"methods holds {method!r}, which is no method; pass instances such as methods.FusedAdaLN()")
    kinds = [type(method) for method in chosen]
    if len(set(kinds)) != len(kinds):
        raise TypeError(f"methods names {', '.join(k.__name__ for k in kinds)}: each kind may be given once")
    return chosen  # type: ignore[return-value]  # the union above is narrowed by the loop


def _nothing_matched(method: Method, models: list[nn.Module], report: PatchReport) -> str:
    reasons = sorted({f"{c}: {why}" for (name, c, why) in report.skipped if name == method.name})
    seen = sorted({type(m).__name__ for model in models for m in model.children()})
    text = f"{method.name} found nothing to patch in {', '.join(type(m).__name__ for m in models)}"
    if reasons:
        return f"{text}: {'; '.join(reasons)}"
    return f"{text}: it knows no module in it (its children are {', '.join(seen) or 'none'}). Is it a diffusion transformer?"


def _backend_of(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return select(None, torch.device("cpu"), torch.float32)
    return select(None, parameter.device, parameter.dtype if parameter.dtype in KERNEL_DTYPES else torch.float32)
