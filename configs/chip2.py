"""Chip2 of OIG, question and answer without their labels as the paper's code has it. Steps and batch are base.py's.

python -m experiments.train --config=configs/chip2.py --config.model.path=DIR
--config.data.path=chip2 --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "chip2"  # text: "<human>: question\n<bot>: answer"
    return c.lock()
