"""`python -m maskaccel.bench`: run a suite and write its results."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from . import report
from .registry import OPS, dtype_of
from .runner import Settings, run_case
from .suites import SUITES


def main(arguments: list[str] | None = None) -> None:
    """Command line of the suites."""
    parser = argparse.ArgumentParser(prog="python -m maskaccel.bench", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--ops", nargs="*", choices=sorted(OPS), help="only these ops")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--name", help="name of the result files; default: the suite")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(arguments)
    settings = Settings(rounds=options.rounds)
    entries = [e for e in SUITES[options.suite]() if not options.ops or e.op.name in options.ops]
    cases = []
    for entry in tqdm(entries, desc=options.suite):
        case = run_case(
            entry.op, entry.shape, dtype_of(entry.dtype), torch.device(options.device), backward=entry.backward,
            compiled=not options.no_compile, settings=settings, model=entry.model,
        )  # fmt: skip
        cases.append(case)
        tqdm.write(report.detail(case.as_dict()))
    data = report.document(cases, settings)
    paths = report.write(data, options.out, options.name or options.suite)
    print(report.markdown(data))
    print("wrote", " and ".join(map(str, paths)))


if __name__ == "__main__":
    main()
