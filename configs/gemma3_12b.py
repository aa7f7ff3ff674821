"""Gemma 3 12B, the part that reads and writes text, on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/gemma3_12b.py --config.data.path=FILE --workdir=runs/gemma3_12b

By plan on an RTX 4090: one row a micro-batch, 20.8 GB on the device; at 60% of the roofline 1.1 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "google/gemma-3-12b-it"  # gated: huggingface_hub asks for a token
    return c.lock()
