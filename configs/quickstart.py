"""The quickstart: the embedded Llama of 2.6 million parameters learns to follow instructions in a minute or two.

python -m experiments.train --config=configs/quickstart.py --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.path = "assets/tiny_llama"
    c.model.compute_dtype = "float32"  # what CPUs are fast at
    c.model.remat = "selective"  # a seventh less work a step than "block" here; the same bits

    c.lora.rank = 16
    c.lora.alpha = 16.0
    c.lora.dropout = 0.0  # one short pass over the data cannot overfit

    c.data.path = "assets/instructions/train.json"
    c.data.eval_path = "assets/instructions/heldout.json"
    c.data.eval_examples = 0  # all
    c.data.max_source_len = 80  # tokens
    c.data.max_target_len = 16  # tokens
    c.data.pad_to_multiple_of = 16  # tokens

    c.optimizer.learning_rate = 5e-3  # a small model takes more than a large one
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 10
    c.optimizer.max_grad_norm = 1.0

    c.train.steps = 150
    c.train.grad_accum = 1
    c.train.loss_chunk = 128  # tokens: a batch has some 70 targets, so logits are computed of no more
    c.train.checkpoint_every = 50  # steps

    c.eval.every = 75  # steps
    c.eval.batch_size = 50
    return c.lock()
