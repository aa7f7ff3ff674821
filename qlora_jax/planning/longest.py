"""The longest sequence that fits a GPU, found by compiling: memory grows in a straight line with it."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_jax.errors import InputError
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.planning.memory import usable_bytes
from qlora_jax.planning.plan import Plan, make_plan
from qlora_jax.settings import AUTO
from qlora_jax.train.spec import read_sizes

STEP = 1024  # tokens: lengths are multiples of it
FIRST = (4 * STEP, 8 * STEP)
TRIES = 6


class Longest(NamedTuple):
    """The longest length that fits, its plan, and the shortest that was compiled and does not."""

    tokens: int
    plan: Plan
    too_long: int | None


def longest_context(config: Any, gpu: PlannedGpu, say: Callable[[str], None] = lambda line: None) -> Longest:
    """Of one sequence a micro-batch, one micro-batch a step; all else as `config` has it.

    A line through two lengths says where the card is full; lengths there are compiled until two neighbours are found or
    TRIES are spent. Raises InputError where not even FIRST[0] tokens fit.
    """
    if read_sizes(config).kind.bidirectional:
        raise InputError("an encoder's rows are as long as its positions: there is no longest context to look for")
    plans: dict[int, Plan] = {}

    def peak(tokens: int) -> int:
        if tokens not in plans:
            plans[tokens] = make_plan(_with_length(config, tokens), gpu, say, advise=False)
        return plans[tokens].memory.peak.total

    room = usable_bytes(gpu)
    low, high = FIRST
    if peak(low) > room:
        raise InputError(f"not even {low} tokens fit {gpu.device_kind}: {peak(low) / 1e9:.2f} of {room / 1e9:.2f} GB")
    for _ in range(TRIES):
        slope = max((peak(high) - peak(low)) / (high - low), 1.0)
        guess = int((room - peak(low)) / slope + low) // STEP * STEP
        fitting = [tokens for tokens, plan in plans.items() if plan.fits]
        failing = [tokens for tokens, plan in plans.items() if not plan.fits]
        guess = max(guess, max(fitting))
        if failing:
            guess = min(guess, min(failing) - STEP)
        if guess in plans:
            guess = max(fitting) + STEP  # is it the last that fits?
        if guess in plans:
            break
        peak(guess)
        low, high = sorted(plans)[-2:]
    best = max(tokens for tokens, plan in plans.items() if plan.fits)
    return Longest(best, plans[best], min((tokens for tokens, plan in plans.items() if not plan.fits), default=None))


def _with_length(config: Any, tokens: int) -> Any:
    changed = copy.deepcopy(config)
    changed.data.max_source_len, changed.data.max_target_len = tokens // 2, tokens - tokens // 2
    changed.data.pack_length = 0
    changed.data.eval_examples, changed.data.eval_path = 0, ""
    with changed.ignore_type():  # it may be "auto"
        changed.train.batch_size = changed.train.grad_accum = 1
    if changed.model.remat == AUTO:
        changed.model.remat = "block+offload"  # takes least
    return changed
