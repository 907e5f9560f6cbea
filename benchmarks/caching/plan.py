"""The runs that are compared by default, a few settings of each method from careful to bold.

The peers' settings are those that came out best of about ninety on ten images of other seeds, not their defaults, some
of which fire rarely or not at all on this model.
"""

from __future__ import annotations

OURS = (
    "FusedAdaLN",
    "FORA:interval=2",
    "FORA:interval=3",
    "FORA:interval=5",
    "FORA:interval=3+FusedAdaLN",
)

PEERS = (
    # A residual of the whole stack, extrapolated; its signal is the change of the latents.
    "diffusers.SeaCache:threshold=0.25,consecutive=2",
    "diffusers.SeaCache:threshold=0.25,consecutive=4",
    "diffusers.SeaCache:threshold=0.25,consecutive=6",
    "diffusers.SeaCache:threshold=0.5,consecutive=6,power=2.0",
    "diffusers.SeaCache:threshold=1.0,consecutive=6",
    # sites='model' forecasts the output of the model alone.
    "diffusers.TaylorSeer:interval=2,sites='model'",
    "diffusers.TaylorSeer:interval=3,sites='model'",
    "diffusers.TaylorSeer:interval=4,sites='model'",
    "diffusers.TaylorSeer:interval=6,sites='model'",
    "diffusers.TaylorSeer:interval=3",
    "diffusers.TaylorSeer:interval=4",
    "diffusers.TaylorSeer:interval=6",
    "cache-dit.DBCache:threshold=0.06,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.16,continuous=3,warmup=8,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.9,continuous=3,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.9,continuous=5,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.24,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.9,continuous=3,calibrator='dmd'",
    "cache-dit.DBCache:threshold=0.9,continuous=5,calibrator='dmd'",
    "cache-dit.DBCache:threshold=0.06",
    "cache-dit.DBCache:threshold=0.12",
    "cache-dit.DBCache:threshold=0.24",
    "cache-dit.DBCache:threshold=0.06,calibrator='foca'",
    "cache-dit.DBCache:threshold=0.24,calibrator='foca'",
    "cache-dit.SCM:policy='fast',calibrator='taylor1'",
    "diffusers.MagCache:threshold=0.06,skips=3,retention=0.1",
    "diffusers.MagCache:threshold=0.12,skips=4,retention=0.1",
    "diffusers.MagCache:threshold=0.24,skips=6,retention=0.1",
    "diffusers.FirstBlockCache:threshold=0.05",
    "diffusers.FirstBlockCache:threshold=0.1",
    "diffusers.FirstBlockCache:threshold=0.2",
    # Attention alone; the unconditional branch and attention.
    "diffusers.PAB:interval=2",
    "diffusers.FasterCache",
)

RUNS = ("none", *OURS, *PEERS)
