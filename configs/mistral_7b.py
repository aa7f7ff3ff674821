"""Mistral 7B Instruct v0.3 on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/mistral_7b.py --config.data.path=FILE --workdir=runs/mistral_7b

By plan on an RTX 4090: 2 rows a micro-batch, 20.5 GB on the device; at 60% of the roofline 0.7 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "mistralai/Mistral-7B-Instruct-v0.3"  # gated: huggingface_hub asks for a token
    return c.lock()
