"""Guanaco 33B, the paper's recipe: OASST1's best-ranked paths, all turns trained, 1,875 steps of 16 conversations.

python -m experiments.train --config=configs/guanaco_33b.py --config.data.path=FILE --workdir=runs/guanaco_33b

By plan on an RTX 4090: 2 rows a micro-batch, their layers' inputs in pinned host memory, 22.3 GB on the device, 4.8 GB
pinned; at 60% of the roofline 10 hours.
"""

from ml_collections import ConfigDict

from configs import guanaco


def get_config() -> ConfigDict:
    c = guanaco.get_config()
    c.model.path = "huggyllama/llama-30b"
    c.lora.dropout = 0.05
    c.optimizer.learning_rate = 1e-4
    return c.lock()
