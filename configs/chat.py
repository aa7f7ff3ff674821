"""Chats in a model's own template, packed into rows of 2,048 tokens: what is common to the configs of today's models.
configs/qwen3_8b.py and its siblings name the models and say what they take.

python -m experiments.train --config=configs/chat.py --config.model.path=DIR --config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.remat = "auto"  # what of a layer is kept for the backward pass, as the card has room
    c.lora.rank = 16
    c.lora.dropout = 0.0  # a pass or two over the data: nothing to regularize yet
    c.data.format = "auto"  # found from the rows
    c.data.template = "auto"  # the model's own for chats, with its end tokens
    c.data.packing = True
    c.data.pack_length = 2048  # tokens
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 10
    c.optimizer.max_grad_norm = 1.0
    c.train.steps = 500
    c.train.batch_size = 8  # packed rows: some 16,000 tokens a step
    c.train.grad_accum = "auto"  # as few micro-batches as the card takes
    return c.lock()
