"""Qwen 3 8B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/qwen3_8b.py --config.data.path=FILE --workdir=runs/qwen3_8b

PLAN
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "Qwen/Qwen3-8B"
    return c.lock()
