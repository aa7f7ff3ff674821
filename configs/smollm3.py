"""SmolLM 3 3B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/smollm3.py --config.data.path=FILE --workdir=runs/smollm3

PLAN
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "HuggingFaceTB/SmolLM3-3B"
    return c.lock()
