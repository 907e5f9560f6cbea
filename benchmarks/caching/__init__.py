"""Quality against speed of caching methods on the trained example model, beside the strongest other libraries.

python -m benchmarks.caching quality     # images of the same seeds with every run: PSNR, class accuracy, Fréchet
python -m benchmarks.caching timing      # every run against the baseline, in turns
python -m benchmarks.caching report      # benchmarks/results/caching_cpu.json, docs/caching-quality.md and its plot
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "fashion"
# The example's modules import each other by their bare names, and so do the modules here.
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))
