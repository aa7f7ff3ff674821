"""SmolLM 3 3B on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/smollm3.py --config.data.path=FILE --workdir=runs/smollm3

By plan on an RTX 4090: 2 rows a micro-batch, 13.5 GB on the device; at 60% of the roofline 0.3 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "HuggingFaceTB/SmolLM3-3B"
    return c.lock()
