"""Guanaco 65B, the paper's recipe: OASST1's best-ranked paths, all turns trained, 1,875 steps of 16 conversations.

python -m experiments.train --config=configs/guanaco_65b.py --config.data.path=FILE --workdir=runs/guanaco_65b

By plan on an RTX A6000: 4 rows a micro-batch, 46.2 GB on the device (one row: 42.9 GB), 6.4 GB of pinned host memory;
at 60% of the roofline 21 hours.
"""

from ml_collections import ConfigDict

from configs import guanaco


def get_config() -> ConfigDict:
    c = guanaco.get_config()
    c.model.path = "huggyllama/llama-65b"
    c.lora.dropout = 0.05
    c.optimizer.learning_rate = 1e-4
    return c.lock()
