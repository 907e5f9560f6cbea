"""`maskaccel.patch`: apply methods to a model or pipeline as one reversible transaction."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import nn

from ..ops._backends import KERNEL_DTYPES, select
from ..state.feature import Feature
from ..state.follow import follow_pipeline, is_followed
from ..state.generation import Generation, Run, track
from .report import PatchReport
from .targets import find_models
from .transaction import NO_PICKLE, PatchError, Transaction

OWNER = "_maskaccel_patch"
_REPLACED = "the pipeline's scheduler was replaced after the patch, so nothing is reused: remove() and patch again"


class Method(Protocol):
    """What `patch` asks of a method: a hashable recipe that plans edits and later tells what it did."""

    @property
    def name(self) -> str:
        """How reports and errors call it."""

    def attach(self, context: Context) -> None:
        """Plan edits through `context`; raise PatchError if the method cannot work on the model."""

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """What the method did on a patched model since the patch, for the report."""


class Context:
    """What a method sees of one model while it plans its edits."""

    def __init__(self, model: nn.Module, transaction: Transaction, report: PatchReport, generation: Generation,
                 scheduler: Any = None) -> None:  # fmt: skip
        self.model, self.transaction, self.report, self.generation = model, transaction, report, generation
        self.scheduler = scheduler  # of the pipeline, if there is one
        self.planned = 0
        self.tracked = False
        self.drops: str | None = None  # the method that runs blocks on tokens that change from step to step
        self.remembers: str | None = None  # the one that keeps features for later steps

    def done(self, method: str, module: Any, action: str) -> None:
        """Count a patched site."""
        self.planned += 1
        self.report.sites[method, type(module).__name__, action] += 1

    def skip(self, method: str, module: Any, reason: str) -> None:
        """Count a site that stays as it is, and why."""
        self.report.skipped[method, type(module).__name__, reason] += 1

    def track_generation(self, method: str) -> Generation:
        """The model's generation, advanced by the model's own calls from now on."""
        if not self.tracked:
            track(self.model, self.generation, self.transaction, method)
            self.tracked = True
        return self.generation


class Patch:
    """A patched target. Use it as a context manager, or call `remove()`."""

    def __init__(self, target: Any, methods: tuple[Method, ...], models: list[nn.Module], transaction: Transaction,
                 report: PatchReport, generations: list[Generation], follows: bool) -> None:  # fmt: skip
        self.target, self.methods, self.models = target, methods, models
        self._transaction, self._report, self._generations = transaction, report, generations
        self._follows = follows
        self.active = True

    def report(self) -> PatchReport:
        """What was patched, on which backend, what was left and why; what the methods did since, until `remove()`."""
        if self.active:
            for method in self.methods:
                self._report.activity[method.name] = _total([method.activity(model) for model in self.models])
            for note in (note for one in self._generations for note in one.notes):
                if note not in self._report.notes:
                    self._report.notes.append(note)
            scheduler = getattr(self.target, "scheduler", None)
            if self._follows and not is_followed(scheduler) and _REPLACED not in self._report.notes:
                self._report.notes.append(_REPLACED)
        return self._report

    def remove(self) -> None:
        """Restore the target exactly. Calling it again does nothing."""
        if not self.active:
            return
        self.report()
        for one in self._generations:
            one.end()
        self._report.notes += self._transaction.undo()
        self.active = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        # Reached while a patched model (or the whole target) is being copied: the copy gets a patch of its own. What
        # lies outside the copied models, such as the rest of their pipeline, is not copied along.
        whole = id(self.target) in memo
        models = [model for model in self.models if whole or id(model) in memo]
        inside = {id(module) for model in models for module in model.modules()}
        if whole:
            inside |= {id(self.target), id(getattr(self.target, "scheduler", None))}
        edits = [edit for edit in self._transaction.edits if id(edit.owner) in inside]
        new = memo[id(self)] = object.__new__(Patch)
        new.methods, new.active, new._follows = self.methods, self.active, self._follows and whole
        new.models = copy.deepcopy(models, memo)
        new.target = memo[id(self.target)] if whole else new.models[0] if len(models) == 1 else new.models
        new._report = copy.deepcopy(self._report, memo)
        new._generations = [
            copy.deepcopy(g, memo) for m, g in zip(self.models, self._generations, strict=True) if m in models
        ]
        new._transaction = Transaction(copy.deepcopy(edits, memo))
        return new

    def __reduce__(self) -> Any:
        raise PatchError(NO_PICKLE)

    @contextlib.contextmanager
    def generation(
        self, num_steps: int | None = None, *, timesteps: Sequence[float] | torch.Tensor | None = None
    ) -> Iterator[Run]:
        """One denoising run of a loop of your own (a pipeline does this by itself).

        Call `step()` of the yielded object after each step. A model that runs several times a step, once per guidance
        branch, names the branch: `with run.branch("cond"):`.

        Args:
            num_steps: Steps of the run, if known.
            timesteps: The scheduler's timesteps (1000 to 0) of every step; some methods are bound to a window of them.

        Raises:
            ValueError: `num_steps` is below 1, or another number than that of `timesteps`; or a method needs what is
                not told.
        """
        try:
            for one in self._generations:
                one.begin(num_steps, timesteps)
            yield Run(self._generations)
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


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The activity of one method on several models: numbers are added, letters by step laid over each other.

    Whether anything was reused is asked of the sum: a model that a pipeline runs for a few steps may reuse nothing.
    """
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(total.get(key), int | float):
                total[key] += value
            elif key in total and key.startswith("steps"):
                total[key] = "".join(b if a == " " else a for a, b in zip_longest(total[key], value, fillvalue=" "))
            else:
                total.setdefault(key, value)
    if total.get("computed") and not total.get("reused") and not total.get("in part"):
        total.setdefault("warning", "never reused anything")
    return total


def patch(target: Any, methods: Method | Sequence[Method] | None = None) -> Patch:
    """Patch a pipeline or model in place, as one transaction: all of it, or nothing.

    Args:
        target: A diffusers pipeline (every transformer in it is patched), or any `nn.Module`.
        methods: What to apply, such as `[methods.FORA(interval=3), methods.FusedAdaLN()]`. None is `FusedAdaLN()`.

    Returns:
        The patch, with `report()`, `remove()`, `generation()`; also a context manager. Patching again with the same
        methods returns the patch that is there.

    Raises:
        TypeError: `methods` holds something that is no method.
        PatchError: The target is patched with other methods, a method matches nothing in it, or two methods want one
            site. The target is unchanged.
    """
    chosen = _as_methods(methods)
    models, pipeline = find_models(target)
    for model in models:
        held = model.__dict__.get(OWNER)
        if held is not None and held.active:
            if held.methods == chosen and held.target is target:
                return held
            names = ", ".join(method.name for method in held.methods)
            raise PatchError(f"{type(model).__name__} is already patched with [{names}]; remove() that patch first")

    transaction, report = Transaction(), PatchReport()  # nothing is changed before its commit
    generations = [Generation() for _ in models]
    scheduler = getattr(pipeline, "scheduler", None)
    contexts = [Context(m, transaction, report, g, scheduler) for m, g in zip(models, generations, strict=True)]
    for method in chosen:
        before = sum(context.planned for context in contexts)
        for context in contexts:
            method.attach(context)
            _keep_apart(context, method.name)
        if sum(context.planned for context in contexts) == before:
            raise PatchError(_nothing_matched(method, models, report))
    report.models = [type(model).__name__ for model in models]
    report.backend = _backend_of(models[0])
    follows = pipeline is not None and any(context.tracked for context in contexts)
    if follows:
        follow_pipeline(pipeline, generations, transaction)
    result = Patch(target, chosen, models, transaction, report, generations, follows)
    for model in models:
        transaction.set(model, OWNER, result, "maskaccel")
    transaction.commit()
    return result


def _keep_apart(context: Context, method: str) -> None:
    """Features of some tokens are no features of those of the next step, which may be as many: nothing would tell."""
    if context.remembers is None and any(isinstance(memory, Feature) for memory in context.generation.memories):
        context.remembers = method
    if context.drops and context.remembers:
        raise PatchError(
            f"{context.remembers} keeps features from step to step, and {context.drops} runs the blocks of "
            f"{type(context.model).__name__} on other tokens at every step; use one of them"
        )


def _as_methods(methods: Method | Sequence[Method] | None) -> tuple[Method, ...]:
    if methods is None:
        from ..methods import FusedAdaLN

        return (FusedAdaLN(),)
    chosen = tuple(methods) if isinstance(methods, list | tuple) else (methods,)
    if not chosen:
        raise TypeError("methods is empty; pass at least one method, such as methods.FusedAdaLN()")
    for method in chosen:
        if isinstance(method, type) or not hasattr(method, "attach"):
            raise TypeError(f"methods holds {method!r}, which is no method; pass instances like methods.FusedAdaLN()")
    kinds = [type(method) for method in chosen if not getattr(method, "several", False)]
    if len({id(method) for method in chosen}) != len(chosen):
        raise TypeError("methods holds the same object twice")
    if len(set(kinds)) != len(kinds):
        raise TypeError(f"methods names {', '.join(k.__name__ for k in kinds)}: each kind may be given once")
    return chosen


def _nothing_matched(method: Method, models: list[nn.Module], report: PatchReport) -> str:
    reasons = sorted({f"{c}: {why}" for (name, c, why) in report.skipped if name == method.name})
    seen = sorted({type(m).__name__ for model in models for m in model.children()})
    text = f"{method.name} found nothing to patch in {', '.join(type(m).__name__ for m in models)}"
    if reasons:
        return f"{text}: {'; '.join(reasons)}"
    children = ", ".join(seen) or "none"
    return f"{text}: it knows no module in it (its children are {children}). Is it a diffusion transformer?"


def _backend_of(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return select(None, torch.device("cpu"), torch.float32)
    return select(None, parameter.device, parameter.dtype if parameter.dtype in KERNEL_DTYPES else torch.float32)
