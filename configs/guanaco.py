"""Guanaco's recipe of the paper: the best-ranked path of each OASST1 tree, all turns trained, 1,875 steps of 16
conversations. configs/guanaco_7b.py and its siblings name the models and say what they take.

python -m experiments.train --config=configs/guanaco.py --config.model.path=DIR --config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "oasst1"  # trees, or the flattened rows of openassistant-guanaco
    c.data.max_source_len = 16  # tokens; the source is BOS alone
    c.data.max_target_len = 512  # tokens; the whole conversation is the target, and the paper cuts it here
    c.optimizer.paging = "always"  # the paper's paged optimizer
    c.train.grad_accum = "auto"  # the 16 conversations in as few micro-batches as the card takes
    c.model.remat = "auto"  # together with what of a layer is kept for the backward pass
    return c.lock()
