"""Phi 4 (14B) on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/phi4.py --config.data.path=FILE --workdir=runs/phi4

By plan on an RTX 4090: one row a micro-batch, 21.7 GB on the device; at 60% of the roofline 1.4 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "microsoft/phi-4"
    return c.lock()
