"""Learning-rate schedules and the optax transformation of a config."""

from typing import Any

import optax

from qlora_jax.errors import InputError
from qlora_jax.optim.eightbit import adamw8bit, lion8bit
from qlora_jax.optim.pages import RowWise

_PAGED = "paged_"
OPTIMIZERS = (
    "adamw", "adamw8bit", "lion", "lion8bit", "sgd",
    "paged_adamw", "paged_adamw8bit", "paged_lion", "paged_lion8bit",
)  # fmt: skip
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
    return make_transformation(config, schedule, config.weight_decay)


def make_transformation(config: Any, learning_rate: Any, weight_decay: Any) -> RowWise:
    """optax of the section's name, betas and eps; the rate may be a schedule, and each of the two an array []."""
    if config.name not in OPTIMIZERS:
        raise InputError(f"optimizer.name is {config.name!r}; known: {', '.join(OPTIMIZERS)}")
    return RowWise(*_transformation(config, learning_rate, weight_decay))


def _transformation(config: Any, learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    betas = (config.beta1, config.beta2)
    match config.name.removeprefix(_PAGED):
        case "adamw":
            return optax.adamw(learning_rate, *betas, config.eps, weight_decay=weight_decay)
        case "adamw8bit":
            return adamw8bit(learning_rate, *betas, config.eps, weight_decay)
        case "lion":
            return optax.lion(learning_rate, *betas, weight_decay=weight_decay)
        case "lion8bit":
            return lion8bit(learning_rate, *betas, weight_decay)
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, config.beta1 or None))


def paging(config: Any) -> str:
    """optimizer.paging; "always" where the optimizer's name says so. Raises InputError where the two contradict."""
    if not config.name.startswith(_PAGED):
        return config.paging
    if config.paging == "never":
        raise InputError(
            f'optimizer.name is {config.name!r}, but optimizer.paging is "never": set optimizer.paging=auto, or '
            f"optimizer.name={config.name.removeprefix(_PAGED)}"
        )
    return "always"
