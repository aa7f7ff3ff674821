"""Learning-rate schedules and the optax transformation of a config."""

from typing import Any

import optax

from qlora_jax.errors import InputError

OPTIMIZERS = ("adamw", "lion", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(name: str, learning_rate: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate at update 0, 1, ...: a linear rise over warmup_steps, then the schedule.

    Update k of the warm-up (from 0) has learning_rate * (k + 1) / (warmup_steps + 1): no update is wasted at zero.
    linear and cosine fall to zero at the end of `steps`.
    """
    if name not in SCHEDULES:
        raise InputError(f"optimizer.schedule is {name!r}; known: {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or warmup_steps >= max(steps, 1):
        raise InputError(f"optimizer.warmup_steps is {warmup_steps}; expected 0 to below train.steps ({steps})")
    rest = steps - warmup_steps
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
    }[name]
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """The `optimizer` section of a config -> optax. Clipping is in train/step.py: it needs the whole gradient."""
    schedule = make_schedule(config.schedule, config.learning_rate, steps, config.warmup_steps)
    if config.name == "adamw":
        return optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay)
    if config.name == "lion":
        return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, config.beta1 or None))
    raise InputError(f"optimizer.name is {config.name!r}; known: {', '.join(OPTIMIZERS)}")
