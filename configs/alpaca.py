"""Alpaca's recipe of the paper on one device: source 384, target 128 tokens, 1,875 steps of 16 examples.

python -m experiments.train --config=configs/alpaca.py --config.model.path=DIR --config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "alpaca"  # instruction, input, output
    c.data.max_source_len = 384  # tokens
    c.data.max_target_len = 128  # tokens
    return c.lock()
