"""Alpaca's recipe of the paper on one device: 1,875 steps of 16 examples, which are trained whole. The paper cuts them:
--config.data.max_source_len=384 --config.data.max_target_len=128 (of 999 rows with answers of today's length, 486 lose
their end then).

python -m experiments.train --config=configs/alpaca.py --config.model.path=DIR --config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "alpaca"  # instruction, input, output
    return c.lock()
