"""The commands. Heavy imports happen inside them, so that help and `info` are quick and survive a broken torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="maskaccel",
    help="Custom kernels and one-line patches that make diffusion transformers faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _fail(message: object) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def parse_shape(text: str) -> tuple[int, ...]:
    """`2,4096,1152` or `2x4096x1152` as a tuple; ValueError otherwise."""
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--shape {text!r} is no list of sizes such as 2,4096,1152")
    return tuple(int(part) for part in parts)


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices, and which libraries are loaded against which are installed."""
    from .info import print_info

    print_info(as_json=as_json)


@app.command()
def doctor(
    as_json: AsJson = False,
    device: Annotated[Optional[str], typer.Option(help="Only this device, such as cpu or cuda:0.")] = None,  # noqa: UP045
) -> None:
    """Run every op on every backend of this machine, forward and backward, against the fp64 reference."""
    from .doctor import examine, print_table

    try:
        checks = examine(device)
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps([check.as_dict() for check in checks], indent=1))
    else:
        print_table(checks)
    if any(check.outcome == "fail" for check in checks):
        raise typer.Exit(1)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The published methods: what each does, and whether it is exact."""
    from .methods import describe, print_methods

    if as_json:
        typer.echo(json.dumps(describe(), indent=1))
    else:
        print_methods()


@app.command()
def plan(
    method: Annotated[str, typer.Argument(help="Name of a method; `maskaccel methods` lists them.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run.")] = 28,
    values: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="An argument of the method, such as interval=3; may be repeated."),
    ] = None,
    timesteps: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The scheduler's timesteps, 1000 to 0, such as 999,850,600; default: falling evenly."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a method would do at each step, before anything runs."""
    from .plan import describe_plan, print_plan

    try:
        times = None if timesteps is None else [float(text) for text in timesteps.split(",")]
        data = describe_plan(method, values or (), steps if times is None else len(times), times)
    except (ValueError, OSError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        print_plan(data)
    if "warning" in data:
        typer.echo(f"warning: {data['warning']}", err=True)


@app.command()
def calibrate(
    kind: Annotated[Optional[str], typer.Argument(help="What to measure; `--list` shows the kinds.")] = None,  # noqa: UP045
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Folder of a diffusers pipeline, or module:function of yours; default: the trained example."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="The file to write; default: KIND.json.")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 28,
    runs: Annotated[int, typer.Option(min=1, help="Runs that are measured, with seeds 0, 1, ...")] = 1,
    values: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="An option of the kind, such as encoder=19; may be repeated."),
    ] = None,
    calls: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--call", help="An argument of the pipeline's call, such as prompt=a cat; may be repeated."),
    ] = None,
    component: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a pipeline with several transformers, the one to measure."),
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="A torch device; default: CUDA where there is one.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], typer.Option(help="Default: float32 on a CPU, else bfloat16.")] = None,  # noqa: UP045
    list_kinds: Annotated[bool, typer.Option("--list", help="List the kinds and their options.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a method needs to know of a model, by ordinary runs of it, and write it as JSON."""
    from ..patching import PatchError
    from .calibrate import describe, kinds, run_calibration
    from .demo import DemoError

    if list_kinds or kind is None:
        typer.echo(kinds())
        return
    try:
        result, path = run_calibration(
            kind, model, out=out, steps=steps, runs=runs, values=values or (), calls=calls or (), component=component,
            device=device, dtype=dtype, progress=not as_json,
        )  # fmt: skip
    except (DemoError, PatchError, ValueError, OSError) as error:
        raise _fail(error) from None
    typer.echo(json.dumps(result.as_dict(), indent=1) if as_json else describe(result, path))


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="Name of an op, such as norm_modulate.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, ...; default: every device here.")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """Which backends can run an op here, and why the others cannot."""
    from .methods import explain_op, print_explained

    try:
        rows = explain_op(op, dtype, device)
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        print_explained(op, dtype, rows)


@app.command()
def bench(
    op: Annotated[Optional[str], typer.Argument(help="Name of an op; `--list` shows them.")] = None,  # noqa: UP045
    shape: Annotated[Optional[list[str]], typer.Option(help="Sizes such as 2,4096,1152; may be repeated.")] = None,  # noqa: UP045
    dtype: Annotated[Optional[list[str]], typer.Option(help="fp32, bf16 or fp16; may be repeated.")] = None,  # noqa: UP045
    backend: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="cuda, cpu, triton or reference; may be repeated. Default: all kernels that can run."),
    ] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,  # noqa: UP045
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward instead of the forward.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each provider.")] = 15,
    list_ops: Annotated[bool, typer.Option("--list", help="List the ops and the shapes of real models.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time an op on a shape of yours against eager, torch.compile and a copy; correctness is checked first."""
    from .bench import print_ops, time_op

    if list_ops or op is None:
        print_ops()
        return
    try:
        shapes = [parse_shape(text) for text in shape or ()]
        data = time_op(op, shapes, dtype or ["bf16"], backend, device, backward, compiled, rounds, progress=not as_json)
    except ValueError as error:
        raise _fail(error) from None
    if as_json:
        typer.echo(json.dumps(data, indent=1))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of demo.png and demo.json, or the path of the .png.")] = Path("."),
    model: Annotated[Optional[Path], typer.Option(help="The example's folder or an exported pipeline.")] = None,  # noqa: UP045
    images: Annotated[int, typer.Option(min=1, help="Images sampled each way.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 15,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 2.0,
    interval: Annotated[int, typer.Option(min=1, help="FORA computes every N-th step.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[Optional[str], typer.Option(help="A torch device; default: CUDA where there is one.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 0,
) -> None:
    """Patch the trained example, sample the same seeds with and without, write demo.png and demo.json."""
    from .demo import DemoError, run_demo

    try:
        run_demo(
            model, images=images, steps=steps, guidance=guidance, interval=interval, dtype=dtype, device=device,
            seed=seed, out=out,
        )  # fmt: skip
    except (DemoError, ValueError) as error:
        raise _fail(error) from None
