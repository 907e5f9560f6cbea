"""Token dropping, measured: training steps on routes, partial-token inference, guided steps, sampling of logits."""
