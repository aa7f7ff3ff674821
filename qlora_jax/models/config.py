"""The sizes and the kind of a decoder, read from a Hugging Face config.json (old and transformers-5 spelling)."""

import dataclasses
import difflib
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import loads, read_whole
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.families.encoders import DECODERS, PART, beside_an_encoder, decoder_of
from qlora_jax.models.kind import LINEAR_ROLES, LLAMA, Kind
from qlora_jax.models.roberta.names import head_outer
from qlora_jax.models.settings import MOST, MOST_LAYERS, Settings
from qlora_jax.models.t5.config import DEFAULTS as T5
from qlora_jax.models.t5.config import read_t5

_MOST_EXPERTS = 2**16  # of all layers together: each has names of its own. Models that are known have 24,000


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    D: int  # model width
    F: int  # feed-forward width
    L: int  # layers, those of an encoder too
    N: int  # query heads
    K: int  # key/value heads; N / K queries share one
    H: int  # head width
    V: int  # vocabulary
    context: int  # tokens the model was made for
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...]  # () or the items of transformers' rope parameters
    tied: bool  # the head is the embedding
    eos_ids: tuple[int, ...]
    bos_id: int | None
    kind: Kind = LLAMA

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a layer, which are quantized: name -> [O, I], in the order in which they compute.

        Of a stack of experts that is the shape of one; `copies` says how many there are.
        """
        if self.kind.pair:
            return self.kind.pair.linears(self.D, self.F, self.N * self.H)
        values = {"D": self.D, "F": self.F, "2F": 2 * self.F, "NH": self.N * self.H, "KH": self.K * self.H}
        values["QKV"] = values["NH"] + 2 * values["KH"]
        found = {}
        for role, (O, I) in LINEAR_ROLES.items():
            if role in self.kind.linear:
                found[self.kind.linear[role]] = values[O], values[I]
        return found

    @cached_property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Everything else of a layer: names of norms, and of biases with ".bias" at the end -> shape."""
        kind = self.kind
        if kind.pair:
            return dict.fromkeys(kind.pair.norms, (self.D,))
        by_kind: dict[str, dict[str, tuple[int, ...]]] = {
            "head": {"q_norm": (self.H,), "k_norm": (self.H,)},
            "heads": {"q_norm": (self.N, self.H), "k_norm": (self.K, self.H)},
            "heads apart": {"q_norm": (self.N, self.H), "k_norm": (self.K, self.H)},
            "whole": {"q_norm": (self.N * self.H,), "k_norm": (self.K * self.H,)},
        }
        of_heads = by_kind[kind.qk_norm]
        found: dict[str, tuple[int, ...]] = {}
        for role, name in kind.norms:
            found[name] = of_heads.get(role, (self.D,))
            if kind.norm_bias and not (role in of_heads and kind.qk_norm == "heads apart"):
                found[f"{name}.bias"] = found[name]
        for role in kind.biased:
            if role in kind.linear:
                name = kind.linear[role]
                found[f"{name}.bias"] = (*self.copies(name), *self.linears[name][:1])
        if kind.sinks:
            found[kind.sinks] = (self.N,)
        if kind.experts:
            found[kind.experts.router] = (kind.experts.count, self.D)
            if kind.experts.router_bias:
                found[f"{kind.experts.router}.bias"] = (kind.experts.count,)
        return found

    @cached_property
    def sixteen_bit(self) -> frozenset[str]:
        """Those of `vectors` that stay as they are on disk; the others are float32 always."""
        kind = self.kind
        others = {kind.sinks} | ({kind.experts.router, f"{kind.experts.router}.bias"} if kind.experts else set())
        return frozenset({f"{name}.bias" for name in self.linears} | others)

    @property
    def sparse(self) -> bool:
        """Whether a token meets some of the weights only."""
        return self.kind.experts is not None

    def copies(self, name: str) -> tuple[int, ...]:
        """Axes between L and [O, I] of a linear layer's stack: (E,) of experts, else ()."""
        return (self.kind.experts.count,) if self.kind.experts and self.is_expert(name) else ()

    def is_expert(self, name: str) -> bool:
        return self.kind.is_expert(name)

    def units(self, name: str) -> list[str]:
        """See Kind."""
        return self.kind.units(name)

    def slots(self, name: str) -> dict[str, tuple[int, ...]]:
        """Key of each weight of a linear layer -> its place in the stack, (layer,) or (layer, expert)."""
        found: dict[str, tuple[int, ...]] = {}
        for index in range(self.depth(name)):
            units = self.units(name)
            places = [(index, e) for e in range(len(units))] if self.is_expert(name) else [(index,)]
            found |= {self.key(index, unit): place for unit, place in zip(units, places, strict=True)}
        return found

    def depth(self, name: str) -> int:
        """Layers that have a part of that name: all, but where there are two stacks of them."""
        return self.L if self.kind.pair is None else self.kind.pair.depth(name)

    def weights(self, name: str) -> int:
        """Weights of a linear layer, all layers and experts together."""
        return math.prod((self.depth(name), *self.copies(name), *self.linears[name]))

    @cached_property
    def outer(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What stands outside of the layers: its name in Decoder's weights -> Hugging Face key, shape."""
        kind, D = self.kind, self.D
        if kind.pair:
            return kind.pair.outer(self.V, D, self.N, self.tied)
        width = self.head_width
        found: dict[str, tuple[str, tuple[int, ...]]] = {"embedding": (f"{kind.embedding}.weight", (self.V, width))}
        if kind.project_in:
            found["project_in"] = f"{kind.project_in}.weight", (D, width)
            found["project_out"] = f"{kind.project_out}.weight", (width, D)
        for slot, name in (("norm", kind.final_norm), ("embedding_norm", kind.embedding_norm)):
            if name:
                found[slot] = f"{name}.weight", (D,)
                if kind.norm_bias:
                    found[f"{slot}.bias"] = f"{name}.bias", (D,)
        if kind.positions:
            found["positions"] = f"{kind.positions}.weight", (self.context + kind.position_offset, D)
        if kind.bidirectional:
            found |= head_outer(kind.bidirectional, D)
        if not self.tied:
            found["head"] = f"{kind.head}.weight", (self.V, width)
        if kind.head_bias:
            found["head.bias"] = f"{kind.head}.bias", (self.V,)
        return found

    def is_float32(self, slot: str) -> bool:
        """Whether one of `outer` is float32 always; the others stay as they are on disk."""
        return "norm" in slot or (self.kind.bidirectional is not None and slot.startswith(self.kind.bidirectional.head))

    @property
    def head_width(self) -> int:
        """Of the embedding, and of hidden states as the head takes them."""
        return self.kind.embedding_width or self.D

    @property
    def embedding_key(self) -> str:
        return f"{self.kind.embedding}.weight"

    @property
    def head_key(self) -> str:
        """Where a head of its own stands, whether or not this model has one."""
        return f"{self.kind.head}.weight"

    def module(self, index: int, name: str) -> str:
        """(3, "self_attn.q_proj") -> "model.layers.3.self_attn.q_proj", as Hugging Face calls it."""
        return self.kind.module(index, name)

    def key(self, index: int, name: str) -> str:
        """As `module`, of the tensor: a name's weight, or a bias or sinks, whose names are whole."""
        if name.endswith(".bias") and self.is_expert(name):
            return self.module(index, f"{name.removesuffix('.bias')}_bias")
        return self.module(index, name) + ("" if name.endswith((".bias", ".sinks")) else ".weight")

    def pieces(self, index: int, name: str) -> dict[str, tuple[int, ...]]:
        """The tensors on disk that make one of `vectors` in a layer: key -> shape. One, or one of each head."""
        shape, kind = self.vectors[name], self.kind
        if kind.qk_norm == "heads apart" and name in (kind.norm_of.get("q_norm"), kind.norm_of.get("k_norm")):
            return {self.key(index, f"{name}.norms.{head}"): shape[1:] for head in range(shape[0])}
        return {self.key(index, name): shape}

    def transposes(self, name: str) -> bool:
        """Whether a linear layer's weights lie [I, O] in unquantized files."""
        experts = self.kind.experts
        return self.kind.transposed or (experts is not None and experts.fused_alone and self.is_expert(name))

    def stored(self, name: str) -> tuple[int, ...]:
        """[O, I] of a linear layer as it lies in unquantized files."""
        shape = self.linears[name]
        return shape[::-1] if self.transposes(name) else shape


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming the file when it is missing, too large, or no JSON object."""
    try:
        value = loads(read_whole(path))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; expected a Hugging Face checkpoint folder with config.json") from error
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def parse_config(raw: dict, where: str) -> ModelConfig:
    """config.json -> ModelConfig.

    Raises:
      InputError: the architecture is unknown (known ones are listed), a size is missing or nonsense, or the model asks
        for what is not implemented and would be computed wrongly.
    """
    name = whole = _architecture(raw, where)
    if has_encoder := name in DECODERS:
        name, raw = decoder_of(raw, where)
        where = f"{where}: {PART}"
    if name in T5:
        return ModelConfig(**read_t5(raw, where, name))
    if name not in FAMILIES:
        known = ", ".join((*FAMILIES, *DECODERS, *T5))
        raise InputError(f"{where}: unknown architecture {name}{_near(name)}; known: {known}")
    family = FAMILIES[name]
    c = Settings(raw, where, family.defaults)
    file = raw.get("transformers_weights")
    if file not in (None, "model.safetensors", "model.safetensors.index.json"):
        raise InputError(f"{where}: transformers_weights is {file!r}; expected model.safetensors, or no such key")
    keys = family.keys
    D, N, V = (c.count(*keys[letter]) for letter in "DNV")
    L = c.count(*keys["L"], most=MOST_LAYERS)
    says_F = bool(keys["F"]) and c.get(keys["F"][0]) is not None
    F = c.count(*keys["F"]) if says_F or not family.default_F else 4 * D
    K = next((value for key in keys["K"] if (value := c.get(key)) is not None), None) or N
    if not isinstance(K, int) or K < 1 or N % K:
        raise InputError(f"{where}: {N} attention heads cannot share {K} key/value heads evenly")
    H = c.get("head_dim") if family.has_head_dim else None
    if H is None and D % N and not family.has_head_dim:
        raise InputError(f"{where}: {D} wide cannot be cut into {N} heads evenly")
    H = H or D // N
    if not isinstance(H, int) or not 1 <= H <= MOST:
        raise c.wrong("head_dim", f"a positive integer, {MOST:,} at most")
    context = c.get(keys["context"][0], 2048)
    if not isinstance(context, int) or context < 1:
        raise c.wrong(keys["context"][0], "a positive integer")
    sizes = {"D": D, "F": F, "L": L, "N": N, "K": K, "H": H, "V": V, "context": context}
    described = family.describe(c, sizes)
    kind, (theta, scaling) = described.kind, described.rope
    kind = beside_an_encoder(kind, whole) if has_encoder else kind
    if kind.experts and L * kind.experts.count > _MOST_EXPERTS:
        raise InputError(
            f"{where}: {kind.experts.count:,} experts in each of {L:,} layers; at most {_MOST_EXPERTS:,} are read"
        )
    width = kind.rotary_width or H
    if kind.rotary and (width % 2 or width < 2):
        raise InputError(f"{where}: head width {width} is odd; rotary embedding turns pairs")
    if kind.rotary and width < 4 and dict(scaling).get("rope_type") == "dynamic":
        raise InputError(f"{where}: rope scaling 'dynamic' needs heads that turn in 4 values or more, not {width}")
    _check_factors(scaling, width, where)
    _check_factors(kind.local_rope[1], width, where)
    eos = raw.get("eos_token_id", family.defaults.get("eos_token_id"))
    return ModelConfig(
        **(sizes | dict(described.sizes)),
        norm_eps=c.positive(family.eps),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(c.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_id=raw.get("bos_token_id", family.defaults.get("bos_token_id")),
        kind=kind,
    )


def _architecture(raw: dict, where: str) -> str:
    named = raw.get("architectures") or [f"(none; model_type {raw.get('model_type')!r})"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise InputError(f"{where}: architectures is {named!r}; expected a list of names")
    return named[0]


def _near(name: str) -> str:
    """What kind an unknown architecture is of, or the known one that it may be meant as, or be mistaken for."""
    if name.endswith("ForConditionalGeneration"):
        return " (it has an encoder, of images, sound or text, that is not known)"
    names = {known.lower(): known for known in FAMILIES}
    near = difflib.get_close_matches(name.lower(), names, 1, 0.8)
    if not near:
        return ""
    known = names[near[0]]
    if name.lower() == known.lower():
        return f" (written {known})"
    return f" (which is not {known}, the nearest known one: its weights cannot be read as such)"


def _check_factors(scaling: tuple[tuple[str, Any], ...], width: int, where: str) -> None:
    for key, value in scaling:
        if key in ("short_factor", "long_factor") and (not isinstance(value, tuple) or len(value) != width // 2):
            found = len(value) if isinstance(value, tuple) else repr(value)
            raise InputError(f"{where}: rope scaling has a {key} of {found} numbers; expected {width // 2}")
