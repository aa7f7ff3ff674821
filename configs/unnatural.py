"""Unnatural Instructions, the core data. Steps and batch are base.py's.

python -m experiments.train --config=configs/unnatural.py --config.model.path=DIR
--config.data.path=unnatural-instructions --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "unnatural-instructions"  # instruction, instances; with reformulations, those too
    return c.lock()
