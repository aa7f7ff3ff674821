"""The members of a pack: what of their configs must be equal, what may differ, and the arrays that carry it."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax import lora
from qlora_jax.data.glue.tasks import FORMAT as GLUE
from qlora_jax.data.glue.tasks import task_of
from qlora_jax.data.read import data_sets
from qlora_jax.errors import InputError
from qlora_jax.feed.load import LoadedData
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.dropout import DropoutRate
from qlora_jax.models.roberta.names import head_shapes
from qlora_jax.optim.schedules import make_schedule
from qlora_jax.packs.step import Member
from qlora_jax.settings import config_hash, differing_keys

# Keys in which members of a pack may differ, beside those of data that do not shape a batch.
FREE = (
    "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "lora.use_rslora", "lora.init_from",
    "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "optimizer.weight_decay",
    "optimizer.max_grad_norm", "train.seed", "train.steps", "train.log_every",
)  # fmt: skip

_TEXTS = ("path", "revision", "format", "template")  # keys of data that decide what its rows say


def pack_key(plain: dict[str, Any]) -> str:
    """Configs (settings.resolved) with equal keys may train in one pack, and are worth it: rows of like length, and all
    or none of them with dropout. A hash in hex."""
    worth = {"has_dropout": plain["lora"]["dropout"] > 0, "length": _length(plain["data"])}
    return config_hash(_required(plain) | worth)


def _length(data: dict[str, Any]) -> Any:
    """Equal for rows of like length: a power of two; or, where the data set alone says how long they are, what names
    its texts."""
    if data["batches"]:
        return data["batches"]
    lengths = (data["max_source_len"], data["max_target_len"])
    longest = (data["packing"] and data["pack_length"]) or (all(lengths) and sum(lengths))
    if longest:
        return 1 << (longest - 1).bit_length()
    return [data[key] for key in _TEXTS], lengths


def check_equal(plains: Sequence[dict[str, Any]]) -> None:
    """Raises InputError, with the keys, where configs differ in what a pack shares."""
    if not plains:
        raise InputError("a pack needs at least one config")
    first = _required(plains[0])
    for number, plain in enumerate(plains):
        if differing := differing_keys(first, _required(plain)):
            raise InputError(
                f"members 0 and {number} of a pack differ in what its members share ({'; '.join(differing)}): train "
                "them in packs of their own (pack_key tells)"
            )


def _required(plain: dict[str, Any]) -> dict[str, Any]:
    kept = {
        section: {key: value for key, value in values.items() if f"{section}.{key}" not in FREE}
        for section, values in plain.items()
        if isinstance(values, dict)
    }
    data = plain["data"]
    kept["data"] = {key: data[key] for key in ("pad_to_multiple_of", "packing")}
    kept["data"]["has batches"] = bool(data["batches"])
    if data["format"] == GLUE:
        kept["data"]["labels"] = _labels(data)
    if "8bit" in plain["optimizer"]["name"]:  # blocks of 256 values that share a scale go across a padded rank
        kept["lora"]["rank"] = plain["lora"]["rank"]
    return kept


def _labels(data: dict[str, Any]) -> Any:
    """Classes of a head for a data set of GLUE; where its task is not known what a run will refuse."""
    try:
        return task_of(data.get("task", ""), data_sets(data["path"])[0]).classes
    except (InputError, IndexError):
        return data["path"]


class Rates(NamedTuple):
    """Learning rates of a run's updates."""

    used: np.ndarray  # float32 [steps], as the optimizer of a single run computes them: one by one, inside a program
    logged: tuple[float, ...]  # as its metrics have them


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedMember:
    """One member, checked and counted."""

    config: Any
    plain: dict[str, Any]
    hash: str
    lora: LoRAConfig
    targets: tuple[str, ...]  # full names, in the order of config.linears
    data: LoadedData
    heldout: str  # hash of the held-out examples
    steps: int
    rates: Rates

    def trainable_params(self, model: Decoder) -> int:
        kind = model.config.kind.bidirectional
        head = head_shapes(kind, model.config.D, self.lora.labels).values() if kind else ()
        adapter = self.lora.rank * sum(lora.rank_one_parameters(model.config, name) for name in self.targets)
        return adapter + sum(map(math.prod, head))


@cache
def learning_rates(schedule: str, learning_rate: float, steps: int, warmup_steps: int) -> Rates:
    rate = make_schedule(schedule, learning_rate, steps, warmup_steps)
    used = jax.jit(lambda numbers: jax.lax.map(lambda k: jnp.float32(rate(k)), numbers))(jnp.arange(steps))
    return Rates(np.asarray(used), tuple(float(rate(k)) for k in range(steps)))


def all_targets(members: Sequence[PlannedMember], sizes: ModelConfig) -> tuple[str, ...]:
    """Layers that any member targets, in the order of config.linears."""
    return tuple(name for name in sizes.linears if any(name in member.targets for member in members))


def stacked_settings(members: Sequence[PlannedMember], slots: int) -> Member:
    """Inputs of the program, [slots, ...]: those beyond the members take no step."""
    idle = slots - len(members)
    rates = [DropoutRate.of(member.lora.dropout) for member in members]

    def column(values: list[Any], dtype: Any) -> np.ndarray:
        return np.asarray(values + [0] * idle, dtype)

    return Member(
        column([member.lora.scale for member in members], np.float32),
        DropoutRate(
            column([rate.threshold for rate in rates], np.int32),
            column([rate.kept_scale for rate in rates], np.float32),
        ),
        jnp.stack([jax.random.key(member.config.train.seed + 1) for member in members] + [jax.random.key(0)] * idle),
        column([member.config.optimizer.max_grad_norm for member in members], np.float32),
        column([member.config.optimizer.weight_decay for member in members], np.float32),
        column([member.steps for member in members], np.int32),
    )


def padded(arrays: dict[str, Any], sizes: ModelConfig, names: Sequence[str], rank: int) -> dict[str, Any]:
    """A member's arrays as the pack holds them: numpy A [L, R, I] and B [L, O, R], zero beyond its rank and layers.

    Of experts E stands after L.
    """
    out = {}
    for name in names:
        (O, I), room = sizes.linears[name], (sizes.depth(name), *sizes.copies(name))
        a, b = np.zeros((*room, rank, I), np.float32), np.zeros((*room, O, rank), np.float32)
        if name in arrays:
            mine_a, mine_b = map(np.asarray, arrays[name])
            a[..., : mine_a.shape[-2], :], b[..., : mine_b.shape[-1]] = mine_a, mine_b
        out[name] = (a, b)
    return out


def cut(arrays: dict[str, Any], member: PlannedMember) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `padded` was made of: the member's own rank and layers."""
    R = member.lora.rank
    return {
        name: (np.array(arrays[name][0][..., :R, :]), np.array(arrays[name][1][..., :R])) for name in member.targets
    }
