"""Gemma 2 9B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/gemma2_9b.py --config.data.path=FILE --workdir=runs/gemma2_9b

PLAN
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "google/gemma-2-9b-it"  # gated: huggingface_hub asks for a token
    return c.lock()
