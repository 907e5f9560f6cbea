"""The demonstration: one trained pipeline, the same seeds with and without a patch, timed in turns and judged.

Heavy imports (torch, diffusers) stay inside the functions, so that the command line can show its help without them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fashion"
VARIANTS = ("original", "accelerated")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class DemoError(RuntimeError):
    """The demonstration cannot run; the message says why and what to do."""


@dataclass(frozen=True)
class Example:
    """Where the example's code and weights lie."""

    code: Path
    weights: Path
    classifier: Path


def find_example(model_dir: str | Path | None = None) -> Example:
    """Locate the trained example.

    Args:
        model_dir: The example's folder (`examples/fashion`) or a pipeline folder exported by its `train.py`. None looks
            beside the installed package (a source checkout) and in `./examples/fashion`.

    Raises:
        DemoError: No trained pipeline is there.
    """
    here = Path.cwd() / "examples" / "fashion"
    candidates = [Path(model_dir)] if model_dir is not None else [EXAMPLE, here]
    for folder in candidates:
        weights = folder if (folder / "model_index.json").is_file() else folder / "weights"
        if not (weights / "model_index.json").is_file():
            continue
        for code in (weights.parent, weights, EXAMPLE, here):
            if (code / "pipeline.py").is_file() and (code / "classifier.py").is_file():
                for judge in (weights / "classifier.safetensors", code / "weights" / "classifier.safetensors"):
                    if judge.is_file():
                        return Example(code, weights, judge)
                raise DemoError(f"{judge} is missing: train it with `python {code / 'train_classifier.py'}`")
        raise DemoError(f"{weights} holds a pipeline, but the pipeline.py and classifier.py it needs are not beside it")
    looked = ", ".join(str(folder) for folder in candidates)
    raise DemoError(
        f"no trained example in {looked}. The weights are not part of the wheel: clone the maskaccel repository "
        "and run the demo there, or pass --model with the path of its examples/fashion folder."
    )


def _load_module(path: Path) -> ModuleType:
    name = f"maskaccel_demo_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DemoError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # diffusers looks the module of a pipeline class up by name
    spec.loader.exec_module(module)
    return module


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    return value


def _synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """`model.to(dtype)` without the warning that diffusers' own `to` gives for every model, concerned or not."""
    from torch import nn

    return nn.Module.to(model, dtype)


def choose_dtype(transformer: Any, device: str, dtype: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype to sample in, and the reason in words.

    On a CPU the two candidates are timed, because bf16 is faster only where the CPU has matrix instructions for it.

    Args:
        transformer: The model, in fp32; it is left so.
        device: Where it will run.
        dtype: `"auto"` or the name of a dtype.
    """
    import copy

    import torch

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype != "auto":
        return getattr(torch, dtype), "asked for"
    if device.startswith("cuda"):
        supported = torch.cuda.is_bf16_supported()
        return (torch.bfloat16, "supported by this GPU") if supported else (torch.float32, "this GPU lacks bf16")
    seconds = {}
    for candidate in (torch.float32, torch.bfloat16):
        model = _cast(copy.deepcopy(transformer), candidate)
        inputs = _forward_inputs(model, 8)
        rounds = []
        for _ in range(4):
            began = time.perf_counter()
            with torch.no_grad():
                model(**inputs)
            rounds.append(time.perf_counter() - began)
        seconds[candidate] = min(rounds[1:])
    best = min(seconds, key=lambda key: seconds[key])
    measured = ", ".join(f"{str(key).removeprefix('torch.')} {1000 * value:.0f} ms" for key, value in seconds.items())
    return best, f"the faster of a probe: {measured}"


def _forward_inputs(transformer: Any, batch: int) -> dict[str, Any]:
    import torch

    config, generator = transformer.config, torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    device = transformer.device
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(device, transformer.dtype),
        "timestep": torch.linspace(50, 950, batch).to(device),
        "class_labels": (torch.arange(batch) % (config.num_embeds_ada_norm + 1)).to(device),
    }


def check_exact(pipe: Any, patched: Callable[[], Any]) -> dict[str, float]:
    """Compare one forward of the exact methods with the unpatched model; both are measured against float64.

    Args:
        pipe: The pipeline, unpatched.
        patched: Makes the patch with the exact methods only; a context manager.

    Returns:
        The largest errors: `original`, `patched` and the limit.

    Raises:
        DemoError: The patched model is further from the truth than rounding explains.
    """
    import copy

    import torch

    model = pipe.transformer
    inputs = _forward_inputs(model, 4)
    with torch.no_grad():
        exact = _cast(copy.deepcopy(model), torch.float64)
        truth = exact(**{**inputs, "hidden_states": inputs["hidden_states"].double()}).sample
        plain = model(**inputs).sample.double()
        with patched():
            fused = model(**inputs).sample.double()
    scale = truth.abs().max().item()
    errors = {
        "original": (plain - truth).abs().max().item() / scale,
        "patched": (fused - truth).abs().max().item() / scale,
    }
    errors["limit"] = 2 * errors["original"] + 1e-6
    if not errors["patched"] <= errors["limit"]:
        raise DemoError(
            f"FusedAdaLN is not exact here: relative error {errors['patched']:.2e} against {errors['original']:.2e} "
            "of the original. Nothing was timed. Please report this with the output of `maskaccel doctor`."
        )
    return errors


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB, for values in 0..1 (99 dB where they are equal)."""
    if images.shape != reference.shape:
        raise ValueError(
            f"images and reference must have one shape, got {tuple(images.shape)}, {tuple(reference.shape)}"
        )
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(1e-10).log10()).clamp_max(99.0)


@dataclass
class _Run:
    """One variant's images and the seconds of each of its chunks."""

    images: list[torch.Tensor]
    seconds: list[float]


def _sample_in_turns(
    pipe: Any,
    patched: Callable[[], Any],
    sample: Callable[[range], torch.Tensor],
    images: int,
    chunk: int,
    device: str,
    progress: bool,
) -> tuple[dict[str, _Run], Any]:
    """Sample every chunk of seeds in both variants; which goes first alternates, so that drift hits both alike."""
    from tqdm import tqdm

    runs = {name: _Run([], []) for name in VARIANTS}
    report: Any = None
    bar = tqdm(total=2 * images, unit="image", desc="demo", disable=not progress)
    for turn, start in enumerate(range(0, images, chunk)):
        part = range(start, min(start + chunk, images))
        for name in VARIANTS if turn % 2 == 0 else VARIANTS[::-1]:
            bar.set_postfix_str(name)
            if name == "original":
                took, result = _timed(sample, part, device)
            else:
                with patched() as patch:
                    took, result = _timed(sample, part, device)
                    report = patch.report().as_dict()
            runs[name].seconds.append(took)
            runs[name].images.append(result)
            bar.update(len(part))
    bar.close()
    return runs, report


def _timed(sample: Callable[[range], torch.Tensor], part: range, device: str) -> tuple[float, torch.Tensor]:
    _synchronize(device)
    began = time.perf_counter()
    result = sample(part)
    _synchronize(device)
    return time.perf_counter() - began, result


def run_demo(
    model_dir: str | Path | None = None,
    *,
    images: int = 1000,
    steps: int = 15,
    guidance: float = 2.0,
    interval: int = 3,
    dtype: str = "auto",
    device: str | None = None,
    batch: int | None = None,
    chunk: int = 50,
    seed: int = 0,
    out: str | Path = ".",
    progress: bool = True,
) -> dict[str, Any]:
    """Sample the same seeds with and without the patch, judge both, write `demo.png` and `demo.json`.

    Args:
        model_dir: See `find_example`. Its `pipeline.py` and `classifier.py` are executed.
        images: How many images are sampled each way; classes in turn.
        steps: Euler steps.
        guidance: Classifier-free guidance scale.
        interval: FORA computes the blocks at every `interval`-th step and reuses their outputs in between.
        dtype: `"auto"` (see `choose_dtype`), `"float32"`, `"bfloat16"` or `"float16"`.
        device: A torch device; None takes CUDA where it is available.
        batch: Images in one call of the pipeline; None takes 10 on a CPU, 250 elsewhere.
        chunk: Images between two changes of the variant.
        seed: Seed of the first image; the i-th has `seed + i`.
        out: Folder of the two files, or the path of the `.png`.
        progress: Show a bar and print the table.

    Returns:
        What `demo.json` holds.

    Raises:
        DemoError: The weights or diffusers are missing, or the exact method is not exact on this machine.
        ValueError: An argument is out of its range.
    """
    for name, value in (("images", images), ("steps", steps), ("interval", interval), ("chunk", chunk)):
        _positive(name, value)
    example = find_example(model_dir)
    try:
        import diffusers
    except ImportError as error:
        raise DemoError("the demo needs diffusers: pip install 'maskaccel[diffusers]'") from error
    import torch

    import maskaccel
    from maskaccel import methods
    from maskaccel.bench.fingerprint import fingerprint

    diffusers.utils.logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = _positive("batch", batch if batch is not None else (10 if device == "cpu" else 250))
    names = _load_module(example.code / "data.py").CLASSES
    judge, judge_facts = _load_module(example.code / "classifier.py").load_classifier(example.classifier)
    pipeline_class = _load_module(example.code / "pipeline.py").FashionPipeline

    pipe = pipeline_class.from_pretrained(example.weights, local_files_only=True)
    chosen, reason = choose_dtype(pipe.transformer, device, dtype)
    _cast(pipe.transformer, chosen)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def patched() -> Any:
        return maskaccel.patch(pipe, [methods.FORA(interval=interval), methods.FusedAdaLN()])

    def sample(part: range) -> torch.Tensor:
        parts = []
        for start in range(part.start, part.stop, batch):
            ids = range(start, min(start + batch, part.stop))
            labels, seeds = [i % len(names) for i in ids], [seed + i for i in ids]
            parts.append(pipe(labels, guidance, steps, seeds=seeds, output_type="pt").images.cpu())
        return torch.cat(parts)

    say: Callable[[str], None] = print if progress else lambda text: None
    dtype_name = str(chosen).removeprefix("torch.")
    say(f"{device}, {dtype_name} ({reason}), {torch.get_num_threads()} threads, batch {batch}")
    errors = check_exact(pipe, lambda: maskaccel.patch(pipe, [methods.FusedAdaLN()]))
    say(
        f"FusedAdaLN is exact: relative error {errors['patched']:.1e} against float64, "
        f"{errors['original']:.1e} unpatched"
    )
    warm = range(min(batch, images))
    sample(warm)
    with patched():
        sample(warm)

    runs, report = _sample_in_turns(pipe, patched, sample, images, chunk, device, progress)
    results = {name: torch.cat(run.images) for name, run in runs.items()}
    data: dict[str, Any] = {
        "images": images,
        "steps": steps,
        "guidance": guidance,
        "methods": [f"FORA(interval={interval})", "FusedAdaLN()"],
        "lossy": ["FORA"],
        "device": device,
        "dtype": dtype_name,
        "dtype_reason": reason,
        "batch": batch,
        "chunk": chunk,
        "seed": seed,
        **_timings(runs),
        **_quality(results, judge, len(names)),
        "classifier": judge_facts,
        "exactness_of_fused_adaln": errors,
        "report_of_last_chunk": report,
        "environment": {**fingerprint(), "load_average": [round(value, 2) for value in os.getloadavg()]},
    }
    png = Path(out) if Path(out).suffix == ".png" else Path(out) / "demo.png"
    _write(data, results, names, png)
    say(format_table(data))
    say(f"wrote {png} and {png.with_suffix('.json')}")
    return data


def _timings(runs: dict[str, _Run]) -> dict[str, Any]:
    median = {name: statistics.median(run.seconds) for name, run in runs.items()}
    total = {name: sum(run.seconds) for name, run in runs.items()}
    return {
        "chunk_seconds": {name: [round(value, 4) for value in run.seconds] for name, run in runs.items()},
        "median_seconds": {name: round(value, 4) for name, value in median.items()},
        "total_seconds": {name: round(value, 3) for name, value in total.items()},
        "speedup": round(median["original"] / median["accelerated"], 3),
        "speedup_of_totals": round(total["original"] / total["accelerated"], 3),
    }


def _quality(results: dict[str, torch.Tensor], judge: Any, classes: int) -> dict[str, Any]:
    import torch

    labels = torch.arange(len(results["original"])) % classes
    distance = psnr(results["accelerated"], results["original"])
    right = {name: judge.judge(images * 2 - 1)[0] == labels for name, images in results.items()}
    return {
        "psnr_db": {"mean": round(distance.mean().item(), 2), "lowest": round(distance.min().item(), 2)},
        "class_accuracy": {name: round(value.double().mean().item(), 4) for name, value in right.items()},
    }


def _write(data: dict[str, Any], results: dict[str, torch.Tensor], names: Sequence[str], png: Path) -> None:
    from maskaccel.cli._draw import draw

    images, shown = data["images"], min(len(names), data["images"])
    rows = []
    for name in VARIANTS:
        seconds, accuracy = data["total_seconds"][name] / images, data["class_accuracy"][name]
        rows.append((name, f"{seconds:.3f} s an image\n{accuracy:.1%} right class", results[name][:shown]))
    title = f"{' + '.join(data['methods'])}: {data['speedup']:.2f}x, same seeds"
    footer = (
        f"{images} images each in interleaved chunks, {data['steps']} steps, guidance {data['guidance']:g}, "
        f"{data['device']} {data['dtype']}; PSNR {data['psnr_db']['mean']:.1f} dB; FORA is lossy, FusedAdaLN is not"
    )
    png.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, names[:shown], title, footer).save(png)
    png.with_suffix(".json").write_text(json.dumps(data, indent=2, default=str) + "\n")


def format_table(data: dict[str, Any]) -> str:
    """The result of `run_demo` as text."""
    header = f"{'':12} {'s / image':>10} {'median s / chunk':>17} {'class accuracy':>15} {'PSNR':>9}"
    lines = [header, "-" * len(header)]
    for name in VARIANTS:
        seconds = data["total_seconds"][name] / data["images"]
        loss = "" if name == "original" else f"{data['psnr_db']['mean']:.1f} dB"
        accuracy = f"{data['class_accuracy'][name]:.1%}"
        lines.append(f"{name:12} {seconds:10.4f} {data['median_seconds'][name]:17.3f} {accuracy:>15} {loss:>9}")
    points = 100 * (data["class_accuracy"]["accelerated"] - data["class_accuracy"]["original"])
    lines += [
        "",
        f"speed-up {data['speedup']:.2f}x (medians of {len(data['chunk_seconds']['original'])} interleaved chunks), "
        f"class accuracy {points:+.1f} points, {data['images']} images each way",
        "Lossy: FORA reuses the outputs of attention and MLP between full steps, so its images differ a little (PSNR).",
        "Exact: FusedAdaLN computes what the model computes; it differs by rounding only.",
        f"The judge has {data['classifier'].get('test_accuracy', float('nan')):.1%} accuracy on real test images.",
    ]
    return "\n".join(lines)
