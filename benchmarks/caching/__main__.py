"""Command line: `python -m benchmarks.caching {calibrate,quality,timing,report,hits} [--only REGEX] ...`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from classifier import load_classifier
from data import DEFAULT_ROOT, load_split, to_float

from . import ROOT, calibrate, hits, quality, report, timing
from . import __doc__ as description
from .model import Setting
from .plan import RUNS
from .runs import BASELINE, absent
from .store import Store


def _parser() -> argparse.ArgumentParser:
    default = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.caching",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("calibrate", "quality", "timing", "report", "hits"))
    parser.add_argument("--only", metavar="REGEX", help="runs whose text holds a match; the baseline is always made")
    parser.add_argument("--run", action="append", metavar="TEXT", help="a run of yours instead of the planned ones")
    parser.add_argument("--list", action="store_true", help="say what is done, missing or absent; run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "caching", help="finished work; resumed from here")
    parser.add_argument("--images", type=int, default=default.images)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--guidance", type=float, default=default.guidance)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype)
    parser.add_argument("--model", default=default.model, help="pipeline folder, relative to the repository")
    parser.add_argument("--data", type=Path, default=DEFAULT_ROOT, help="Fashion-MNIST, for the Fréchet distance")
    parser.add_argument("--rounds", type=int, default=5, help="of `timing`: pairs of batches for each run")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "caching_cpu.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "caching-quality.md")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    fields = ("images", "steps", "guidance", "batch", "seed", "dtype", "model")
    setting = Setting(**{name: getattr(args, name) for name in fields})
    if args.what == "calibrate":
        calibrate.make(setting, again=True)
        return
    if args.what == "hits":
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "hits.json").write_text(json.dumps(hits.report(setting, args.rounds), indent=1) + "\n")
        return
    texts = [text for text in args.run or RUNS if args.only is None or re.search(args.only, text)]
    texts = [BASELINE, *(text for text in dict.fromkeys(texts) if text != BASELINE)]
    store = Store(args.out, setting)
    if args.list:
        for text in texts:
            state = " ".join(kind for kind in ("quality", "timing") if store.read(text, f"{kind}.json") is not None)
            print(f"{text:70} {absent(text) or state or 'missing'}")
        return
    if args.what == "report":
        report.make(texts, store, args.results, args.page)
        return
    judge, _ = load_classifier()
    real = None
    if args.what == "quality":
        try:
            real = judge.judge(to_float(load_split("test", args.data)[0]))[1]
        except FileNotFoundError as error:
            print(f"no Fréchet distance: {error}")
    for text in texts:
        reason = absent(text)
        if reason is not None:
            print(f"{text}: left out, {reason}")
        elif args.what == "quality":
            quality.measure(text, setting, store, judge, real)
        elif text != BASELINE:
            timing.measure(text, setting, store, args.rounds)


if __name__ == "__main__":
    main()
