"""Microbenchmarks: which ops on which shapes, against what, and how they are timed.

`registry` lists the ops with the shapes of real models and their eager baselines, `runner` checks and times them,
`report` writes tables. `python -m maskaccel.bench` runs a suite, `maskaccel bench OP` one shape of your own.
"""
