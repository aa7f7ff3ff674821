"""Causal attention without its scores in memory: padded and packed rows, windows, soft caps, ALiBi, sinks.

api (the op: gradient, packs, when "auto" takes it) over reference (what it means, in plain JAX) and the kernels of
triton/ (Ampere and later), with scoring (how scores are made) and config (tiles; the tables of what was measured).
"""

from pallas_kernels.attention.api import flash_attention, is_fastest, refusal
from pallas_kernels.attention.scoring import PLAIN, Scoring

__all__ = ["PLAIN", "Scoring", "flash_attention", "is_fastest", "refusal"]
