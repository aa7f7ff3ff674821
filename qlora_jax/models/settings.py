"""Keys of a config.json as values of the right kind; every mistake is one line that names file and key."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.models.kind import ACTIVATIONS

_LARGEST = 2.0**1000  # of a number: floats hold it and what is computed from it
MOST = 2**31 - 1  # of a size: arrays' axes are counted in 32 bits
MOST_LAYERS = 10_000  # ten times what any model has: names are made for each
Rope = tuple[float, tuple[tuple[str, Any], ...]]  # theta and the items of its scaling, () for none
# What each type of scaling must say; what is in OPTIONAL is read where it is said.
_ROPES: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"),
    "longrope": ("factor", "attention_factor"),
}


class Settings:
    """One config.json.

    `defaults`: what transformers takes for absent keys. Methods raise InputError for values that make no model.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        self.raw, self.where, self.defaults = raw, where, defaults

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value; where it is absent, the family's default, else `default`. null is a value."""
        return self.raw.get(key, self.defaults.get(key, default))

    def wrong(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.where}: {key} is {self.get(key)!r}; expected {expected}")

    def count(self, *keys: str, most: int = MOST) -> int:
        """The first of the keys that is there: a positive integer, at most `most`."""
        key = next((key for key in keys if key in self.raw), keys[0])
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, "a positive integer")
        if value > most:
            raise self.wrong(key, f"{most:,} at most")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        check_positive(key, value, self.where)
        return value

    def cap(self, key: str) -> float:
        """A positive number, or 0 for null."""
        return 0.0 if self.get(key) is None else float(self.positive(key))

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | int | None) or value not in (True, False, None):
            raise self.wrong(key, "true or false")
        return bool(value)

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """Refuses all values but these: another would be computed wrongly."""
        value = self.get(key, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            shown = " or ".join(json.dumps(one) for one in allowed)
            raise InputError(f"{self.where}: {key} is {value!r}: {why}; supported is {shown}")

    def activation(self, key: str = "hidden_act") -> str:
        value = self.get(key, "silu")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.wrong(key, f"one of {', '.join(ACTIVATIONS)}")
        return value

    def share(self, *keys: str, default: float) -> float:
        """The part of a head that is rotated: of rope_parameters, else of the first key that is there."""
        inside = self._rope_items().get("partial_rotary_factor")
        value = next((self.raw[key] for key in keys if self.raw.get(key) is not None), default)
        value = inside if inside is not None else value
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise InputError(f"{self.where}: {keys[0]} is {value!r}; expected a number above 0, at most 1")
        return float(value)

    def layer_types(self, L: int, known: Collection[str] = ("full_attention", "sliding_attention")) -> list[str] | None:
        """The kind of each layer, where it is said."""
        value = self.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < L or any(kind not in known for kind in value):
            raise self.wrong("layer_types", f"{L} of {', '.join(known)}")
        return value[:L]

    def window(self, key: str = "sliding_window") -> int:
        """Tokens of a window; 0 for null."""
        return 0 if self.get(key) is None else self.count(key)

    def rope(self, context: int, key: str = "", theta: float | None = None) -> Rope:
        """Rotary parameters, from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling`.

        Where there are both, transformers takes `rope_scaling` alone; that they differ is nobody's wish: an error.
        `key`: the entry of rope_parameters that is meant, where each kind of layer has its own.
        `theta`: what is taken where the entry has none; by default the key rope_theta.
        """
        if theta is None:
            theta = self.raw.get("rope_theta")
        theta = self.defaults.get("rope_theta", 10000.0) if theta is None else theta
        sources = [name for name in ("rope_parameters", "rope_scaling") if self.raw.get(name)]
        if key:
            sources = sources[:1]
        found = {name: self._read_rope(self.raw[name], theta, context, key) for name in sources}
        if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
            said = " and ".join(f"{name} {json.dumps(self.raw[name])}" for name in found)
            raise InputError(
                f"{self.where} has {said}, which differ: keep the one that is meant (transformers takes rope_scaling, "
                f"with theta {found['rope_scaling'][0]:g}, and forgets rope_parameters)"
            )
        return next(iter(found.values()), None) or self._read_rope({}, theta, context, "")

    def _rope_items(self) -> dict[str, Any]:
        said = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}
        if not isinstance(said, dict):
            raise self.wrong("rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters", "an object")
        return said

    def _read_rope(self, said: Any, theta: Any, context: int, entry: str) -> Rope:
        if not isinstance(said, dict):
            raise InputError(f"{self.where}: rope_parameters or rope_scaling is {said!r}; expected an object")
        nested = [name for name, value in said.items() if isinstance(value, dict)]
        if nested and not entry:
            raise InputError(
                f"{self.where}: rope_parameters has one entry for each kind of layer ({', '.join(nested)}), which this "
                "family does not read: give the parameters themselves"
            )
        parameters = (said.get(entry) or {}) if entry else said
        if not isinstance(parameters, dict):
            raise InputError(f"{self.where}: {entry} of rope_parameters is {parameters!r}; expected an object")
        theta = parameters.get("rope_theta", theta)
        check_positive("rope_theta", theta, self.where)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(kind, str):
            raise InputError(f"{self.where}: rope scaling is of type {kind!r}; expected a name")
        kind = self.defaults.get("rope_names", {}).get(kind, kind)
        if parameters.get("llama_4_scaling_beta") and not self.defaults.get("reads_llama_4_scaling"):
            raise InputError(f"{self.where}: llama_4_scaling_beta, which scales queries by place, is not supported")
        if kind == "default":
            return float(theta), ()
        if kind not in _ROPES:
            raise InputError(
                f"{self.where}: rope scaling of type {kind!r} is not supported; known: default, {', '.join(_ROPES)}"
            )
        if missing := [name for name in _ROPES[kind] if name not in parameters]:
            raise InputError(f"{self.where}: rope scaling {kind!r} lacks {', '.join(missing)}")
        items: list[tuple[str, Any]] = [("rope_type", kind)]
        for name in (*_ROPES[kind], *_OPTIONAL.get(kind, ())):
            if (value := parameters.get(name)) is None and name not in _ROPES[kind]:
                continue
            for number in value if name.endswith("_factor") and isinstance(value, list) else [value]:
                check_positive(name, number, self.where)
            items.append((name, tuple(value) if isinstance(value, list) else value))
        if kind in ("yarn", "longrope", "llama3"):
            # a key of its own counts more than the entry in the parameters, which is how transformers reads them
            outer = self.get("original_max_position_embeddings")
            original = parameters.get("original_max_position_embeddings", context)
            original = original if outer is None or entry else outer
            check_positive("original_max_position_embeddings", original, self.where)
            items = [item for item in items if item[0] != "original_max_position_embeddings"]
            items.append(("original_max_position_embeddings", original))
        if kind == "yarn":
            truncates = said.get("truncate", True)
            if not isinstance(truncates, bool):
                raise InputError(f"{self.where}: rope scaling 'yarn' has truncate {truncates!r}; expected a boolean")
            items.append(("truncate", truncates))
        if kind in ("dynamic", "longrope"):
            items.append(("context", context))
        return float(theta), tuple(items)


def check_positive(key: str, value: Any, where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST:
        raise InputError(f"{where}: {key} is {value!r}; expected a positive number")
