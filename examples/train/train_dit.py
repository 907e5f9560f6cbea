"""Train a DiT or SiT, with or without token dropping, in one process or many.

    python examples/train/train_dit.py --folder runs/none --steps 1000
    python examples/train/train_dit.py --folder runs/tread --method tread --steps 1000
    python examples/train/train_dit.py --folder runs/tread --method tread --steps 2000 --resume
    python examples/train/train_dit.py --folder runs/mine --data ~/pictures --size 64 --patch 4  # a folder a class
    torchrun --nproc-per-node 2 examples/train/train_dit.py --folder runs/ddp
    torchrun --nproc-per-node 2 examples/train/train_dit.py --folder runs/fsdp --parallel fsdp

A run folder holds `log.jsonl` (a line for every `--log-every` steps), `checkpoint.pt` and, with `--snapshot-every`,
files of the averaged weights. README.md beside this file says what each method does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import parallel
import recipes
import torch
from clock import Clock, peak_memory_mib
from ema import Ema
from objective import loss
from options import DTYPES, Options, kept, parse
from sources import Batch, Draws, FashionImages, FolderImages, Images, ResidentDraws, Source, held_out, prefetched
from torch import nn
from tqdm import tqdm

from data import DEFAULT_ROOT  # isort: skip  of the example model; `sources` made its folder importable
from loop import lr_factor, save_atomically  # isort: skip


def open_source(options: Options) -> Source:
    """The training images: Fashion-MNIST, or a folder of images."""
    if options.data is None or (Path(options.data) / "train-images-idx3-ubyte.gz").is_file():
        return FashionImages(options.data or DEFAULT_ROOT, size=options.size)
    return FolderImages(options.data, options.size, options.channels)


def open_held_out(options: Options) -> Batch | None:
    """The batch that evaluations use: test images, or those of `eval_data`; None without either."""
    if not options.eval_every:
        return None
    if options.data is None or (Path(options.data) / "t10k-images-idx3-ubyte.gz").is_file():
        source: Source = FashionImages(options.data or DEFAULT_ROOT, "test", options.size)
    elif options.eval_data is not None:
        source = FolderImages(options.eval_data, options.size, options.channels)
    else:
        raise ValueError("eval_every needs eval_data, a folder like that of data, for images of your own")
    return held_out(source, options.eval_images)


class Run:
    """A training run on one rank.

    Args:
        options: What to train.
        where: This rank.
    """

    def __init__(self, options: Options, where: parallel.Ranks) -> None:
        self.options, self.where = options, where
        share = where.world * options.accumulate
        if options.batch % share:
            raise ValueError(
                f"batch={options.batch} must be a multiple of {share}: ranks ({where.world}) times accumulate "
                f"({options.accumulate})"
            )
        self.source, self.held_out = open_source(options), open_held_out(options)
        drawn = (self.source, options.batch, options.seed, options.label_drop, options.flip)
        self.draws = ResidentDraws(*drawn, where.device) if options.resident else Draws(*drawn)
        torch.manual_seed(options.seed)  # the same weights on every rank
        self.objective = recipes.build(options, Images.of(self.source)).to(where.device)
        blocks = self.objective.blocks()
        if options.compile:
            # A graph for each number of tokens, dense and dropped; MDT draws another number at every step.
            for block in blocks:
                block.compile(dynamic=None if options.method == "mdt" else False)
        self.wrapped = parallel.wrap(self.objective, blocks, options.parallel, where)
        self.ema = Ema(self.objective, options.ema)
        self.optimizer = torch.optim.AdamW(
            self.objective.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay,
            fused=where.device.type == "cuda",
        )  # fmt: skip
        self.start, self.clock = 0, Clock()

    # ---------------------------------------------------------------------------------------------------- one step
    def autocast(self) -> contextlib.AbstractContextManager:
        """The dtype of the forward."""
        dtype = DTYPES[self.options.dtype]
        return torch.autocast(self.where.device.type, dtype, enabled=dtype is not None)

    def batches(self) -> Iterator[Batch]:
        """This rank's part of every step to come."""
        count, pinned = self.options.batch // self.where.world, self.where.device.type == "cuda"
        first, steps = self.where.rank * count, range(self.start, self.options.steps)
        if self.options.resident:
            return (self.draws.step(step, first, count) for step in steps)

        def make(step: int) -> Batch:
            batch = self.draws.step(step, first, count)
            return batch.pinned() if pinned else batch

        return prefetched(make, steps.start, steps.stop)

    def step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; the mean loss of this rank's samples, and the norm of the gradient."""
        options, parts = self.options, self.options.accumulate
        total = torch.zeros((), device=self.where.device)
        for i, part in enumerate(batch.split(parts)):
            with parallel.synchronised(self.wrapped, i == parts - 1):
                with self.autocast():
                    mean = loss(self.wrapped, part.to(self.where.device)).mean() / parts
                mean.backward()
            total += mean.detach()
        norm = parallel.unsharded(nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(batch.step, options.steps, options.warmup, options.cooldown)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(batch.step)
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss of the averaged weights on the held-out batch, nothing dropped."""
        assert self.held_out is not None
        self.objective.eval()
        # Not compiled: batches of another size than training's would compile all anew.
        with self.ema.applied(), self.autocast(), torch.compiler.set_stance("force_eager"):
            parts = [
                loss(self.wrapped, part.to(self.where.device))
                for part in self.held_out.split(-(-len(self.held_out.labels) // 64))
            ]
        self.objective.train()
        return torch.cat(parts).mean().item()

    # ---------------------------------------------------------------------------------------------------- states
    def save(self, step: int) -> None:
        """Write the checkpoint of `step` steps."""
        state = {
            "model": parallel.whole(self.objective.state_dict()),
            "ema": parallel.whole(self.ema.state_dict()),
            "optimizer": parallel.whole(self.optimizer.state_dict()),
            "step": step,
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            **self.facts(),
        }
        if self.where.first:
            save_atomically(state, self.options.folder / "checkpoint.pt")
        if self.where.world > 1:
            torch.distributed.barrier()  # a run that goes on at once must find it on every rank

    def load(self) -> None:
        """Go on from the checkpoint of the folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It was made with other options, or has all the steps already.
        """
        path = self.options.folder / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(f"resume: {path} does not exist")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in kept(self.options).items():
            # Of an option that was not there yet the run had the default.
            had = state["options"].get(name, getattr(Options, name, None))
            if had != value:
                raise ValueError(f"resume: the run has {name}={had!r}, not {value!r}")
        if state["step"] >= self.options.steps:
            raise ValueError(f"resume: the run has {state['step']} steps already; steps={self.options.steps}")
        parallel.load_model(self.objective, state["model"])
        self.ema.load_state_dict(state["ema"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.start, self.clock = state["step"], Clock(state["seconds"], state["cpu_seconds"])

    def snapshot(self, step: int) -> None:
        """Write the averaged weights alone."""
        state = parallel.whole(self.ema.state_dict())
        if self.where.first:
            save_atomically({"ema": state, "step": step, **self.facts()}, snapshot_path(self.options, step))

    def facts(self) -> dict[str, Any]:
        """What it takes to build the network again, and the length of the run."""
        images = asdict(self.objective.images)
        return {"options": kept(self.options), "steps": self.options.steps, "images": images}


def snapshot_path(options: Options, step: int) -> Path:
    return options.folder / f"ema-{step:06d}.pt"


def due(every: int, step: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def train(options: Options) -> None:
    """Train as told, on all ranks that torchrun started.

    Raises:
        ValueError: An option is out of its range or does not fit the others; the message names it.
        FileNotFoundError: Data or a checkpoint are missing.
        FileExistsError: The folder holds a run, and `resume` is not set.
    """
    with parallel.ranks(options.device) as where:
        if (options.folder / "checkpoint.pt").is_file() and not options.resume:
            raise FileExistsError(f"{options.folder} holds a run already: add --resume, or take another folder")
        run = Run(options, where)
        if options.resume:
            run.load()
        options.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((options.folder / "log.jsonl").open("a")) if where.first else None
            _loop(run, log)


def _loop(run: Run, log: Any) -> None:
    options, where, steps = run.options, run.where, run.options.steps
    bar = tqdm(total=steps, initial=run.start, unit="step", desc=options.method, disable=not where.first)
    running, since, before = torch.zeros((), device=where.device), run.start, run.clock.seconds

    def write(**record: Any) -> None:
        if log is not None:
            log.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n")
            log.flush()

    for batch in run.batches():
        mean, norm = run.step(batch)
        running += mean
        step = batch.step + 1
        bar.update()
        if due(options.log_every, step, steps):
            total, cpu = where.total(running, run.clock.cpu_seconds)
            value = total / where.world / (step - since)
            seconds = run.clock.seconds
            write(
                step=step,
                loss=value,
                grad_norm=float(norm),
                lr=run.optimizer.param_groups[0]["lr"],
                seconds=seconds,
                cpu_seconds=cpu,
                images_per_second=(step - since) * options.batch / (seconds - before),
                peak_memory_mib=peak_memory_mib(where.device),
            )
            bar.set_postfix(loss=f"{value:.4f}")
            running.zero_()
            since, before = step, seconds
        kept = any(
            due(every, step, steps) for every in (options.eval_every, options.snapshot_every, options.save_every)
        )
        if kept and where.device.type == "cuda":
            torch.cuda.synchronize()  # steps that are still queued are part of training
        with run.clock.stopped():
            if due(options.eval_every, step, steps):
                write(step=step, eval_loss=run.evaluate())
            if due(options.snapshot_every, step, steps):
                run.snapshot(step)
            if due(options.save_every, step, steps):
                run.save(step)
    bar.close()


if __name__ == "__main__":
    train(parse(description=__doc__))
