"""Measuring, for the bench_ commands: nothing that a run needs.

synthetic (random weights) → train and packs (real steps; trace: what each kernel took), generate (answers); attention;
data; torch_side runs torch_script or torch_generate in torch's own Python; bitsandbytes; memory_cap (a smaller GPU out
of a larger one).
"""
