"""Guanaco 7B, the paper's recipe: OASST1's best-ranked paths, all turns trained, 1,875 steps of 16 conversations.

python -m experiments.train --config=configs/guanaco_7b.py --config.data.path=FILE --workdir=runs/guanaco_7b

By plan on an RTX 4090: 8 rows a micro-batch, 20.7 GB on the device (one row: 5.8 GB), 1.3 GB of pinned host memory; at
60% of the roofline 1.4 hours.
"""

from ml_collections import ConfigDict

from configs import guanaco


def get_config() -> ConfigDict:
    c = guanaco.get_config()
    c.model.path = "huggyllama/llama-7b"
    return c.lock()
