"""Qwen 3 8B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/qwen3_8b.py --config.data.path=FILE --workdir=runs/qwen3_8b

By plan on an RTX 4090: 2 rows a micro-batch, 22.8 GB on the device; at 60% of the roofline 0.7 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "Qwen/Qwen3-8B"
    return c.lock()
