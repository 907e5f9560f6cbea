"""The runs that are compared by default, a few settings of each method from careful to bold."""

from __future__ import annotations

OURS = (
    "FusedAdaLN",
    "FORA:interval=2",
    "FORA:interval=3",
    "FORA:interval=5",
)

PEERS = (
    "diffusers.FirstBlockCache:threshold=0.1",
    "diffusers.TaylorSeer:interval=3",
    "diffusers.TaylorSeer:interval=3,sites='model'",
    "diffusers.MagCache:threshold=0.1",
    "diffusers.SeaCache:threshold=0.25",
    "diffusers.PAB:interval=2",
    "diffusers.FasterCache",
    "cache-dit.DBCache:threshold=0.1",
    "cache-dit.DBCache:threshold=0.1,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.1,calibrator='foca'",
    "cache-dit.DBCache:threshold=0.1,calibrator='dmd'",
    "cache-dit.SCM:policy='fast'",
)

RUNS = ("none", *OURS, *PEERS)
