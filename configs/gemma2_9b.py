"""Gemma 2 9B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/gemma2_9b.py --config.data.path=FILE --workdir=runs/gemma2_9b

By plan on an RTX 4090: one row a micro-batch, 17.9 GB on the device; at 60% of the roofline 0.9 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "google/gemma-2-9b-it"  # gated: huggingface_hub asks for a token
    return c.lock()
