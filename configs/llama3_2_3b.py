"""Llama 3.2 3B Instruct on chats in its own template, packed into rows of 2,048 tokens.

python -m experiments.train --config=configs/llama3_2_3b.py --config.data.path=FILE --workdir=runs/llama3_2_3b

By plan on an RTX 4090: 4 rows a micro-batch, 21.6 GB on the device; at 60% of the roofline 0.3 hours.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "meta-llama/Llama-3.2-3B-Instruct"  # gated: huggingface_hub asks for a token
    return c.lock()
