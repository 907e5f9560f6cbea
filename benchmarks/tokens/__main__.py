"""Command line: `python -m benchmarks.tokens {training,partial,regions,unmask,ids,side} ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as description

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=description)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (
        ("training", "training steps of a DiT-S/2 on routes"),
        ("partial", "calls of a DiT-S/2 with a quarter of the tokens active"),
    ):
        sized = commands.add_parser(name, help=text)
        sized.add_argument("--rounds", type=int, default=7)
        sized.add_argument("--batch", type=int, default=8)
        sized.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    unmask = commands.add_parser("unmask", help="confidence_unmask beside the eager float64 path")
    unmask.add_argument("--rounds", type=int, default=7)
    ids = commands.add_parser("ids", help="random_keep beside noise, argsort and argsort")
    ids.add_argument("--rounds", type=int, default=15)
    side = commands.add_parser("side", help="MDT's side block at masked rows beside the whole block")
    side.add_argument("--rounds", type=int, default=9)
    regions = commands.add_parser("regions", help="steps in part on the trained example: sampling, a hole, an edit")
    regions.add_argument("weights", type=Path, help="pipeline folder of the example at 1,024 tokens")
    regions.add_argument("--images", type=int, default=10)
    regions.add_argument("--steps", type=int, default=20)
    regions.add_argument("--rounds", type=int, default=1)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command. Each of them imports only what it needs."""
    args = _parser().parse_args(argv)
    if args.what == "training":
        from . import training

        training.run(args.tokens, args.batch, args.rounds, RESULTS, DOCS)
    elif args.what == "partial":
        from . import partial

        partial.run(args.tokens, args.batch, args.rounds, RESULTS, DOCS)
    elif args.what == "regions":
        from . import regions

        regions.run(args.weights, args.images, args.steps, args.rounds, RESULTS, DOCS)
    elif args.what == "side":
        from . import side

        side.run(args.rounds, RESULTS, DOCS)
    elif args.what == "unmask":
        from . import unmask

        unmask.run(args.rounds, RESULTS, DOCS)
    else:
        from . import ids

        ids.run(args.rounds, RESULTS, DOCS)


if __name__ == "__main__":
    main()
