"""Train the example model: a class-conditional DiT on Fashion-MNIST with rectified flow.

    python examples/fashion/train.py --steps 1500                # writes examples/fashion/runs/dit/
    python examples/fashion/train.py --steps 3000 --resume       # goes on from the last checkpoint
    python examples/fashion/train.py --export                    # the EMA weights as a diffusers pipeline folder
    python examples/fashion/train.py --size 64 --init examples/fashion/weights  # 1,024 tokens, from the small one

The objective is rectified flow: x_t = (1 - t) x + t e, the network predicts e - x, t = sigmoid(normal).
Weight matrices of the blocks are trained with Muon, everything else with AdamW. The learning rate is warmed up, held,
and decayed linearly over the last `--cooldown` of the steps, so a run may be prolonged before that point is reached.
Every step seeds its own generator, so a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from data import DEFAULT_ROOT, NULL_CLASS, load_split, to_float
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from loop import lr_factor, save_atomically
from tqdm import tqdm

HERE = Path(__file__).parent
CONFIG = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "patch_size": 2,
    "sample_size": 32,
    "num_embeds_ada_norm": NULL_CLASS,
}


def prepare(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """An untrained model ready for training: adaLN and the last projection at zero, no labels dropped by itself."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        # Each block owns a label table that would drop labels by itself, independently of the other blocks; then
        # no sample would ever be unconditional in all of them. Labels are dropped once per sample by the loop.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_model(size: int = 32, init: Path | None = None) -> DiTTransformer2DModel:
    """The network: 4.6 M parameters, (size / 2)^2 tokens; untrained, or with the weights of a pipeline folder.

    Positions are no parameters, so weights fit any size.
    """
    model = prepare(DiTTransformer2DModel(**CONFIG | {"sample_size": size}))
    if init is not None:
        trained = DiTTransformer2DModel.from_pretrained(init / "transformer").state_dict()
        model.load_state_dict(trained, strict=True)
    return model


def build_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the attention and MLP matrices, AdamW for embeddings, modulation, biases and the two ends."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = "transformer_blocks" in name and ("attn1" in name or "ff.net" in name)
        (matrices if inside and p.ndim == 2 else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=lr * 1.5, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def train(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    args.run.mkdir(parents=True, exist_ok=True)
    images, labels = load_split("train", args.data)
    images, labels = images.to(device), labels.to(device)

    model = build_model(args.size, args.init).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model, args.lr)
    base_lrs = [[group["lr"] for group in opt.param_groups] for opt in optimizers]
    start, seconds = 0, 0.0
    checkpoint = args.run / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for opt, opt_state in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        start, seconds = state["step"], state["seconds"]

    forward = torch.compile(model) if args.compile else model
    generator = torch.Generator(device)
    log = (args.run / "log.jsonl").open("a")
    running, began = [], time.perf_counter()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", desc="train")
    for step in bar:
        generator.manual_seed(args.seed * 1_000_003 + step)
        pick = torch.randint(len(images), (args.batch,), generator=generator, device=device)
        x, y = to_float(images[pick]), labels[pick]
        if args.size != x.shape[-1]:
            x = torch.nn.functional.interpolate(x, size=(args.size, args.size), mode="bilinear")
        drop = torch.rand(args.batch, generator=generator, device=device) < 0.1
        y = torch.where(drop, NULL_CLASS, y)
        t = torch.randn(args.batch, generator=generator, device=device).sigmoid()
        noise = torch.randn(x.shape, generator=generator, device=device)
        t4 = t[:, None, None, None]
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            velocity = forward(torch.lerp(x, noise, t4), timestep=1000 * t, class_labels=y).sample
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = lr_factor(step, args.steps, args.warmup, args.cooldown)
        for opt, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        running.append(loss.item())
        if (step + 1) % args.log_every == 0:
            mean = sum(running) / len(running)
            running.clear()
            bar.set_postfix(loss=f"{mean:.4f}")
            total = seconds + time.perf_counter() - began
            log.write(json.dumps({"step": step + 1, "loss": mean, "seconds": round(total, 1)}) + "\n")
            log.flush()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizers": [opt.state_dict() for opt in optimizers],
                "step": step + 1,
                "seconds": seconds + time.perf_counter() - began,
            }
            save_atomically(state, checkpoint)


def export(args: argparse.Namespace) -> None:
    """Write the EMA weights as a folder that `FashionPipeline.from_pretrained` reads offline."""
    state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = build_model(args.size)
    model.load_state_dict(state["ema"])
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out / "transformer", safe_serialization=True)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000).save_pretrained(args.out / "scheduler")
    index = {
        "_class_name": "FashionPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"step {state['step']}, {state['seconds'] / 60:.0f} minutes of training -> {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--run", type=Path, default=HERE / "runs" / "dit", help="checkpoint and log folder")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="folder of --export")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side; larger ones are upsampled images")
    parser.add_argument("--init", type=Path, default=None, help="pipeline folder whose weights training starts from")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the exported weights")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--cooldown", type=float, default=0.35, help="share of the steps over which the rate decays")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
