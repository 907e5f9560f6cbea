"""Command line: `python -m benchmarks.attention {tiles,speed,schedule,selection,sampling} ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as description

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("tiles", help="share of tiles touched; minutes on one core")
    speed = commands.add_parser("speed", help="time against density")
    speed.add_argument("--tokens", type=int, default=4096)
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--no-flex", action="store_true", help="leave FlexAttention out, which compiles for minutes")
    commands.add_parser("schedule", help="predicted balance of the GPU kernels; a minute or two on one core")
    commands.add_parser("selection", help="predicted cost of choosing tiles on a GPU; seconds")
    sampling = commands.add_parser("sampling", help="methods on the trained example")
    sampling.add_argument("weights", type=Path, help="pipeline folder of the example at 1,024 tokens")
    sampling.add_argument("--images", type=int, default=32)
    sampling.add_argument("--batch", type=int, default=8)
    sampling.add_argument("--steps", type=int, default=20)
    sampling.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    sampling.add_argument("--error", type=float, default=0.02, help="of the calibrated thresholds")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command. Each of them imports only what it needs."""
    args = _parser().parse_args(argv)
    if args.what == "tiles":
        from . import tiles

        tiles.run(RESULTS / "attention_tiles.json", DOCS / "attention.md")
    elif args.what == "speed":
        from . import speed

        speed.run(args.tokens, args.rounds, RESULTS, DOCS, flex=not args.no_flex)
    elif args.what == "schedule":
        from . import schedule

        schedule.run(DOCS / "attention-speed.md")
    elif args.what == "selection":
        from . import selection

        selection.run(DOCS / "attention-speed.md")
    else:
        from . import sampling

        sampling.run(args.weights, args.images, args.batch, args.steps, args.dtype, args.error, RESULTS, DOCS)


if __name__ == "__main__":
    main()
