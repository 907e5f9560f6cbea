"""Fused adaLN ops."""

from .api import gate_residual, gate_residual_norm_modulate, gated_activation, norm_modulate, qk_norm_rope

__all__ = ["gate_residual", "gate_residual_norm_modulate", "gated_activation", "norm_modulate", "qk_norm_rope"]
