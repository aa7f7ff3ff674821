"""A sweep for tests: get_config's model.path is to be given."""

from configs import quickstart
from qlora_jax.sweep.grid import axis, chain, group, product


def get_config():
    c = quickstart.get_config()
    c.data.max_examples, c.data.eval_path, c.data.eval_examples = 24, "", 4
    c.lora.targets = ("q_proj", "down_proj")  # compiles sooner than all
    c.train.steps, c.train.batch_size, c.optimizer.warmup_steps = 3, 4, 0
    c.eval.every = 0
    return c.lock()


def sweep():
    seeds = axis("train.seed", [0, 1])
    return chain(
        group("types", product(axis("quant.format", ["nf4", "fp4"]), seeds)),
        group("rates", product(axis("optimizer.learning_rate", [1e-3, 5e-3]), seeds)),  # one program for both
    )
