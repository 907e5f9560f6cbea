"""diffusers' DiT as its authors would write a cache for it: the parts around the blocks, in plain torch."""

from __future__ import annotations

import torch


def inputs(steps, batch=1, seed=0, pace=0.1):
    """Latents that move along a line, and their timesteps: `[(x, t)]`."""
    generator = torch.Generator().manual_seed(seed)
    start, move = (torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(2))
    return [(start + i * pace * move, torch.full((batch,), 900 - 800 * i // steps)) for i in range(steps)]


def blocks(model, hidden, t, labels, which=slice(None)):
    """The hidden states after some of the blocks."""
    for block in model.transformer_blocks[which]:
        hidden = block(hidden, timestep=t, class_labels=labels)
    return hidden


def head(model, hidden, t, labels):
    """The model's output from the hidden states after the last block."""
    emb = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
    y = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    y = y.reshape(-1, 4, 4, 2, 2, model.out_channels)
    return torch.einsum("nhwpqc->nchpwq", y).reshape(-1, model.out_channels, 8, 8)


@torch.no_grad()
def held(model, calls, labels, computes, encoder=slice(None)):
    """A plain cache: what the blocks in `encoder` add is held while `computes[step]` is false; the others run."""
    outs, kept = [], None
    for (x, t), compute in zip(calls, computes, strict=True):
        hidden = model.pos_embed(x)
        if compute:
            kept = blocks(model, hidden, t, labels, encoder) - hidden
        hidden = hidden + kept
        if encoder.stop is not None:
            hidden = blocks(model, hidden, t, labels, slice(encoder.stop, None))
        outs.append(head(model, hidden, t, labels))
    return torch.stack(outs)


@torch.no_grad()
def patched(model, methods, calls, labels):
    """The same calls through a patched model, and what its (first) method says it did."""
    import maskaccel

    outs = []
    with maskaccel.patch(model, methods) as patch, patch.generation(len(calls)) as run:
        for x, t in calls:
            outs.append(model(x, timestep=t, class_labels=labels).sample)
            run.step()
        report = patch.report()
    return torch.stack(outs), next(iter(report.activity.values()))
