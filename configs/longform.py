"""LongForm: instructions for long texts. Steps and batch are base.py's; the lengths are chosen for long answers.

python -m experiments.train --config=configs/longform.py --config.model.path=DIR
--config.data.path=longform --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "longform"  # input, output
    c.data.max_source_len = 512  # tokens
    c.data.max_target_len = 1024  # tokens
    c.eval.batch_size = 4  # sequences
    return c.lock()
