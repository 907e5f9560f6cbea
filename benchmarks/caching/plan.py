"""The runs that are compared by default, a few settings of each method from careful to bold.

The peers' settings are those that came out best of about ninety on ten images of other seeds, not their defaults, some
of which fire rarely or not at all on this model. `@kind` is a calibration of the example (`calibrate.py`).
"""

from __future__ import annotations

OURS = (
    "DPCache:calibration=@products,refresh=2.5",
    "DPCache:calibration=@products,refresh=3.5",
    "DPCache:calibration=@products,refresh=3.5+FusedAdaLN",
    "DPCache:calibration=@products,refresh=4",
    "DPCache:calibration=@products,refresh=4.2",
    "DPCache:calibration=@products,refresh=5",
    "TaylorSeer:interval=4",
    "DMD:interval=4",
    "FoCa:interval=4",
    "HyCa:calibration=@hyca,interval=4",
    "SpeCa:threshold=0.3,max_drafts=5",
    "FBCache:threshold=0.2,max_consecutive=4,first=3,forecaster=Taylor(1)",
    "DBCache:threshold=0.2,lead=1,first=4,max_consecutive=4,forecaster=Taylor(1)",
    "SCM:policy='fast',forecaster=Taylor(1)",
    "MagCache:ratios=@magnitudes,threshold=0.12,max_consecutive=4,retention=0.1",
    "MagCache:ratios=@magnitudes,threshold=0.12,max_consecutive=4,retention=0.1,forecaster=Newton(1)",
    "TeaCache:polynomial=@teacache,threshold=0.3,max_consecutive=5",
    "TeaCache:polynomial=@teacache,threshold=0.3,max_consecutive=5,forecaster=Taylor(1)",
    "FORA:interval=3",
    "FORA:interval=3,level='stack'",
    "Sortblock:interval=5,beta=0.3",
    "SkipCache:interval=3,outer=1",
    "DDT:encoder=4,refresh=3",
    # Some tokens are always computed.
    "ToCa",
    "DuCa",
    "ClusCa",
    # Attention alone; attention and the unconditional branch.
    "PAB:spatial=2,low=100.0,high=950.0",
    "FasterCache",
)

PEERS = (
    # A residual of the whole stack, extrapolated; its signal is the change of the latents.
    "diffusers.SeaCache:threshold=0.25,consecutive=6",
    "diffusers.SeaCache:threshold=0.5,consecutive=6,power=2.0",
    # sites='model' forecasts the output of the model alone.
    "diffusers.TaylorSeer:interval=3,sites='model'",
    "diffusers.TaylorSeer:interval=4,sites='model'",
    "diffusers.TaylorSeer:interval=6,sites='model'",
    "diffusers.TaylorSeer:interval=4",
    "cache-dit.DBCache:threshold=0.24,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.9,continuous=3,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.9,continuous=5,calibrator='taylor1'",
    "cache-dit.DBCache:threshold=0.24",
    "cache-dit.SCM:policy='fast',calibrator='taylor1'",
    "diffusers.MagCache:threshold=0.12,skips=4,retention=0.1",
    "diffusers.MagCache:threshold=0.24,skips=6,retention=0.1",
    "diffusers.FirstBlockCache:threshold=0.1",
)

RUNS = ("none", *OURS, *PEERS)
