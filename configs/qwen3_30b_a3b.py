"""Qwen 3 30B-A3B, a mixture of 128 experts, on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/qwen3_30b_a3b.py --config.data.path=FILE --workdir=runs/qwen3_30b_a3b

By plan on an RTX 4090: one row a micro-batch, 22.6 GB on the device; at 60% of the roofline 0.8 hours. That leaves out
what starting many small kernels takes. Every expert has an adapter: 422 M parameters, 7 M of them of attention.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "Qwen/Qwen3-30B-A3B"
    c.lora.rank = 8  # of each expert; 16 does not fit 24 GB
    return c.lock()
