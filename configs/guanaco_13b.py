"""Guanaco 13B, the paper's recipe: OASST1's best-ranked paths, all turns trained, 1,875 steps of 16 conversations.

python -m experiments.train --config=configs/guanaco_13b.py --config.data.path=FILE --workdir=runs/guanaco_13b

By plan on an RTX 4090: 4 rows a micro-batch, 21.1 GB on the device (one row: 10.0 GB), 2.0 GB of pinned host memory; at
60% of the roofline 3 hours.
"""

from ml_collections import ConfigDict

from configs import guanaco


def get_config() -> ConfigDict:
    c = guanaco.get_config()
    c.model.path = "huggyllama/llama-13b"
    return c.lock()
