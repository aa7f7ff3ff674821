"""LongForm: instructions for long texts. Steps and batch are base.py's.

python -m experiments.train --config=configs/longform.py --config.model.path=DIR
--config.data.path=longform --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "longform"  # input, output
    return c.lock()
