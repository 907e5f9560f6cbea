"""Correctness and speed of the kernels and patches on this machine's GPU.

    python benchmarks/gpu/run.py                       all stages; JSON into benchmarks/results/gpu-<device>.json
    python benchmarks/gpu/run.py --budget 540          the same, over before 540 seconds; says what was left out
    python benchmarks/gpu/run.py --resume              what that file lacks or holds as failed, for the code as it is
    python benchmarks/gpu/run.py --stages micro,attention --only 'FLUX|16384'
    python benchmarks/gpu/run.py --list                stages, items, expected seconds; needs no GPU
    python benchmarks/gpu/run.py --dry-run             every stage at tiny sizes on the CPU, to test the stages

Items run in worker processes, so that one which faults or hangs costs itself alone; the file is written after each.
Needs Python, torch and (for those kernels) Triton; the CUDA kernels come from a prebuilt maskaccel/lib/libmaskaccel.so.
Exit status: 0 all well, also where the time was up; 1 something failed; 3 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

BEGAN = time.monotonic()  # imports are part of a budget

import stages  # noqa: E402
import torch  # noqa: E402
from machine import LIBRARY, fingerprint, has_cuda_kernels  # noqa: E402
from paths import ROOT  # noqa: E402
from pool import Job, Pool, share_caches  # noqa: E402
from results import Results, records  # noqa: E402
from stage import Context, Target  # noqa: E402

CLOSING = 5.0  # seconds of a budget that are kept for ending workers and the last words


class Runner:
    """Runs stages and keeps what they found.

    Args:
        plan: The stages, by name.
        context: For all of them; what was found earlier and what is pending are filled in.
        results: Where entries go.
        budget: Seconds that all may take, from the start of the program.
        only: Items to run, of which "stage/item" holds this expression.
        resume: Leave out what `results` holds of this build.
        began: `time.monotonic()` at which the budget began, if not at the start of the program.
    """

    def __init__(
        self, plan: Mapping[str, stages.Plan], context: Context, results: Results,
        budget: float | None = None, only: str = "", resume: bool = False,
        began: float | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.context, self.results, self.budget = plan, context, results, budget
        self.only, self.resume = re.compile(only), resume
        self.began = BEGAN if began is None else began
        self.problems: dict[str, str] = {}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in plan}
        self.failures: list[str] = []
        self.modules: dict[str, ModuleType] = {}
        self.chosen = 0  # items that `only` holds, also those that are left out because they are known
        self.todo = self._todo()

    def _todo(self) -> dict[str, list[str]]:
        """Items by stage. Later stages first: a stage that prepares them asks what they will run."""
        found: dict[str, list[str]] = {}
        for name in reversed(self.plan):
            context = replace(self.context, earlier=self.results.earlier(), pending=found)
            try:
                module = stages.load(self.plan[name])
                items = module.items(context)
            except Exception as error:  # one stage that cannot say what it does leaves the others alone
                self.problems[name] = f"{type(error).__name__}: {error}"
                continue
            assert len(items) == len(set(items)), f"stage {name} names an item twice"
            self.modules[name] = module
            if getattr(module, "KEEPS", True):
                items = [item for item in items if self.only.search(f"{name}/{item}")]
                self.chosen += len(items)
                if self.resume:
                    self.counts[name]["kept"] = sum(self.results.done(name, item) for item in items)
                    items = [item for item in items if not self.results.done(name, item)]
            found = {name: items, **found}
        return found

    def run(self, log: IO[bytes]) -> bool:
        """All stages; whether everything that ran was well."""
        share_caches()
        pool = Pool(log, keep=self.context.device == "cpu")
        try:
            for name, items in self.todo.items():
                if items:
                    self._stage(pool, name, items)
        except KeyboardInterrupt:
            print("stopped", flush=True)
            self.problems["the run"] = "was stopped"
        finally:
            pool.close()
            self.results.write()
        return not self.failures and not self.problems

    def _stage(self, pool: Pool, name: str, items: list[str]) -> None:
        module, now = self.modules[name], time.monotonic()
        end, why = float("inf"), ""
        if self.budget is not None:
            whole, own = self.began + self.budget - CLOSING, now + self.plan[name].seconds
            end, why = min((whole, "the budget was spent"), (own, f"the stage had its {own - now:.0f} s"))
        context = replace(self.context, earlier=self.results.earlier(), pending=self.todo)

        def done(item: str, entry: dict[str, Any]) -> None:
            self.results.add(name, item, entry)
            self.counts[name][entry["state"]] += 1
            number = sum(self.counts[name][state] for state in ("ok", "failed"))
            record = entry.get("record", {})
            words = entry.get("error") or record.get("summary", "")
            if entry["state"] == "failed":
                self.failures.append(f"{name}/{item}: {words}")
            elif record.get("wrong"):
                words = f"WRONG: {record['wrong']}; {words}"
                self.failures.append(f"{name}/{item}: {record['wrong']}")
            head = f"{time.monotonic() - self.began:5.0f}s {name} {number}/{len(items)} {item}"
            print(f"{head}: {entry['state']} {entry['seconds']:.1f} s {_short(words)}".rstrip(), flush=True)

        job = Job(
            self.plan[name].module, items, asdict(context), module.SECONDS, stages.expected(module),
            1 if self.context.tiny else getattr(module, "PARALLEL", 1), end, why, done,
        )  # fmt: skip
        problem = pool.run(job)
        if hasattr(module, "finish"):
            try:
                module.finish()
            except Exception as error:
                problem = problem or f"its end: {type(error).__name__}: {error}"
        self.counts[name]["left out"] = len(job.left)
        if problem is not None:
            self.problems[name] = problem
        self.results.leave_out(name, job.left, problem or why)
        print(f"      {name}: {_counted(self.counts[name])}, {time.monotonic() - now:.0f} s", flush=True)

    def summary(self) -> Iterator[str]:
        """What passed, failed and was left out, and the goals that were missed."""
        yield "-- summary"
        for name in self.plan:
            if self.counts[name].total():
                yield f"{name:12} {_counted(self.counts[name])}"
        for note in self.results.data["left_out"]:
            names = ", ".join(note["items"][:4]) + (f" and {len(note['items']) - 4} more" if note["items"][4:] else "")
            yield f"left out of {note['stage']} ({_short(note['why'])}): {names}"
        for name, problem in self.problems.items():
            yield f"{name}: {_short(problem)}"
        for failure in self.failures[:40]:
            yield f"FAILED {_short(failure)}"
        if self.failures[40:]:
            yield f"and {len(self.failures) - 40} more failures"
        if self.context.device == "cuda":
            yield from self._goals()

    def _goals(self) -> Iterator[str]:
        goals: list[Target] = []
        for name, module in self.modules.items():
            if hasattr(module, "targets"):
                try:
                    goals += module.targets(records(self.results.data, name))
                except Exception as error:  # what was measured is written; it must not end in a traceback
                    yield f"goals of {name}: {type(error).__name__}: {error}"
        reached = Counter(goal.reached for goal in goals)
        yield f"goals: {reached[True]} reached, {reached[False]} missed, {reached[None]} not measured"
        missed = [goal for goal in goals if goal.reached is False]
        for goal in missed[:40]:
            yield f"missed: {goal.what}: {goal.got:.3g} {goal.unit}, goal {goal.goal:g}"
        if missed[40:]:
            yield f"and {len(missed) - 40} more"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "nothing"


def _short(words: str) -> str:
    return " ".join(words.split())[:200]


def listing(runner: Runner) -> Iterator[str]:
    """Stages, when each is expected to begin, their items and expected seconds."""
    total = 0.0
    for name, items in runner.todo.items():
        module = runner.modules[name]
        one, workers, most = stages.expected(module), getattr(module, "PARALLEL", 1), runner.plan[name].seconds
        seconds = one * len(items) / workers
        yield (
            f"{name}: from {total:.0f} s, {len(items)} items, {workers} at once, {one:g} s each (killed after "
            f"{module.SECONDS:g}): {seconds:.0f} s" + (f", cut to {most:g} by a budget" if seconds > most else "")
        )
        total += seconds if runner.budget is None else min(seconds, most)
        yield from (f"  {item}" for item in items)
    words = "" if runner.budget is None else f", cut to the budget of {runner.budget:g} s"
    yield f"expected: {total:.0f} s{words}, without the starts of workers"
    yield from (f"{name}: {problem}" for name, problem in runner.problems.items())


def parsed() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", help=f"of {', '.join(stages.STAGES)}, with commas between; they run in this order")
    parser.add_argument("--only", default="", metavar="REGEX", help="items of which STAGE/ITEM holds it")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end before so many seconds have passed")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="FILE", help="leave out what is recorded for this build and device"
    )
    parser.add_argument("--out", type=Path, help="JSON file, or folder for it (default benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="stages, items and expected seconds")
    parser.add_argument("--dry-run", action="store_true", help="walk every stage on the CPU at tiny sizes")
    parser.add_argument("--correctness", action="store_true", help="check, do not time: --stages correctness")
    parser.add_argument("--seeds", type=int, default=45, help="random calls per op in the check")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case")
    args = parser.parse_args()
    args.stages = (
        ["correctness"] if args.correctness else args.stages.split(",") if args.stages else list(stages.STAGES)
    )
    for name in ("seeds", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is too few; at least 1")
    for name in args.stages:
        if name not in stages.STAGES:
            parser.error(f"--stages: {name!r} is not known; allowed are {', '.join(stages.STAGES)}")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: {args.only!r} is no regular expression: {error}")
    if args.budget is not None and args.budget <= CLOSING:
        parser.error(f"--budget: {args.budget:g} is too short; it takes more than {CLOSING:g} seconds")
    return args


def _target(out: Path | None, dry: bool, device: str) -> Path | None:
    """The result file."""
    if out is None and dry:
        return None
    out = out or ROOT / "benchmarks" / "results"
    name = "-".join(re.findall("[a-z0-9]+", device.lower()))
    return out if out.suffix == ".json" else out / f"gpu-{name}.json"


def main() -> int:
    """Runs what the command line says."""
    args = parsed()
    dry = args.dry_run
    if not (dry or args.list) and not torch.cuda.is_available():
        print(
            "make gpu: no CUDA device (torch.cuda.is_available() is false), nothing was run; "
            "--list and --dry-run need none"
        )
        return 3
    context = Context("cuda", rounds=args.rounds, seeds=args.seeds)
    if dry:
        context = Context("cpu", tiny=True, rounds=min(args.rounds, 2), seeds=min(args.seeds, 3))
    found = fingerprint("cuda" if torch.cuda.is_available() and not dry else "cpu")
    target = None if args.list else _target(args.out, dry, found["device"])
    before = Path(args.resume) if args.resume else target
    try:
        results = Results(target, found, before if args.resume or (before and before.exists()) else None)
    except ValueError as error:
        print(f"make gpu: {error}")
        return 1
    plan = {name: plan for name, plan in stages.STAGES.items() if name in args.stages}
    runner = Runner(plan, context, results, args.budget, args.only, args.resume is not None)
    if args.only and not (runner.chosen or runner.problems):
        print(f"make gpu: no item of {', '.join(plan)} holds --only {args.only!r}; --list names them")
        return 1
    if args.list:
        print("\n".join(listing(runner)))
        return 0
    if not dry and not has_cuda_kernels():
        print(
            f"make gpu: {LIBRARY.relative_to(ROOT)} is absent or has no CUDA kernels: Triton's alone are checked and "
            "timed; make gpu-bundle builds it where nvcc is"
        )
    print(f"device: {found['device']}, torch {found['torch']}, triton {found['triton']}, build {found['build']}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(target.with_suffix(".log").open("ab"))
        good = runner.run(log)
    print("\n".join(runner.summary()))
    if target is not None:
        print(f"results: {target}, output of the workers: {target.with_suffix('.log')}")
    print("all well" if good else "SOMETHING FAILED, see above: kernels with wrong results were not timed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
