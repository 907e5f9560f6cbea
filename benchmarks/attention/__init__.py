"""Sparse attention: what masks touch, how fast tiles are skipped, and what methods do to samples.

python -m benchmarks.attention tiles      # share of tiles of published masks, by order of tokens; docs/attention.md
python -m benchmarks.attention speed      # tile_attention against density, beside torch
python -m benchmarks.attention schedule   # predicted load balance of the GPU kernels; docs/attention-speed.md
python -m benchmarks.attention selection  # predicted cost of choosing tiles on a GPU; docs/attention-speed.md
python -m benchmarks.attention sampling   # methods on the trained example at 1,024 tokens
"""
