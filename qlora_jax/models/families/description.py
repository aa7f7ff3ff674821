"""What a family's entry says."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.models.kind import LOCAL_ROPE, OWN_ROPE, Kind
from qlora_jax.models.settings import Rope, Settings

# Letter of ModelConfig -> keys of config.json; the first that is there counts.
KEYS: dict[str, tuple[str, ...]] = {
    "D": ("hidden_size",),
    "F": ("intermediate_size",),
    "L": ("num_hidden_layers",),
    "N": ("num_attention_heads",),
    "K": ("num_key_value_heads",),
    "V": ("vocab_size",),
    "context": ("max_position_embeddings",),
}
SLIDES, FULL = "sliding_attention", "full_attention"  # of layer_types
NO_ROTARY: Rope = (10000.0, ())


@dataclasses.dataclass(frozen=True)
class Described:
    """A model of a family: its kind, its rope, and sizes that follow from other keys than KEYS."""

    kind: Kind
    rope: Rope = NO_ROTARY
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's config.json is read.

    describe: (settings, sizes by letter) -> Described; raises InputError for what would be computed wrongly.
    defaults: what transformers takes for keys that are absent.
    keys: as KEYS. eps: the key of the norms' epsilon.
    has_head_dim: head_dim is read; else a head is D / N wide.
    default_F: the feed-forward is 4 D wide where its key is absent or null.
    """

    describe: Callable[[Settings, dict[str, int]], Described]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: KEYS)
    eps: str = "rms_norm_eps"
    has_head_dim: bool = True
    default_F: bool = False


def windows_of(types: list[str] | None, window: int, L: int, all_layers: bool = False) -> tuple[int, ...]:
    """The window of each layer: of those that slide, or with `all_layers` of all."""
    if not window or (types is None and not all_layers):
        return ()
    kinds = [SLIDES] * L if types is None else types
    found = tuple(window if kind == SLIDES else 0 for kind in kinds)
    return found if any(found) else ()


def whole_heads(c: Settings) -> None:
    """Refuses heads that turn in part, for families whose code in transformers turns all of a head."""
    if (share := c.share("partial_rotary_factor", default=1.0)) != 1:
        raise InputError(f"{c.where}: partial_rotary_factor is {share:g}; models of this family turn all of a head")


def local_ropes(
    c: Settings, kind: Kind, types: list[str], context: int, local_key: str, local_theta: float
) -> Described:
    """A model whose layers that slide have a rope of their own, without the scaling of the others.

    local_key, local_theta: the key of its theta beside rope_parameters, and what is taken where that is absent.
    """
    whole_heads(c)
    said = c.raw.get("rope_parameters") or {}
    by_type = isinstance(said, dict) and (FULL in said or SLIDES in said)
    if said and (not by_type or c.raw.get("rope_scaling")):
        raise InputError(
            f"{c.where}: rope_parameters must have an entry for {FULL} and one for {SLIDES}; without them rope_scaling "
            "is that of full attention"
        )
    theta = c.positive(local_key, local_theta) if local_key else local_theta
    own = c.rope(context, FULL) if by_type else c.rope(context)
    local = c.rope(context, SLIDES, theta) if by_type else (float(theta), ())
    ropes = tuple(LOCAL_ROPE if kind_of_layer == SLIDES else OWN_ROPE for kind_of_layer in types)
    return Described(dataclasses.replace(kind, local_rope=local, layer_ropes=() if own == local else ropes), own)
