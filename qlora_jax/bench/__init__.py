"""Measuring, for the bench_ commands: nothing that a run needs.

synthetic (random weights) → train and packs (real steps); data; torch_side runs torch_script in torch's own Python;
bitsandbytes; memory_cap (a smaller GPU out of a larger one).
"""
