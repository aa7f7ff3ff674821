"""adapter_config.json, PEFT's LoraConfig as JSON: each of its keys is read, without effect here, or refused.

KEYS and INITS are the tables; tests/golden/peft/lora_config.json lists the keys of peft 0.21, whose meanings they have:
which modules carry an adapter, of which rank and scale, beside which base. Expressions in the file go through RE2 (of
pyarrow), whose time is linear in what it reads, whatever a file asks for.
"""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.lora import MODULES
from qlora_jax.models.config import read_json
from qlora_jax.residual import OLORA, PISSA

CONFIG = "adapter_config.json"
CLASSES = "SEQ_CLS"  # task_type of a model with a head over classes
HEADS = ("classifier", "score")  # what peft writes into modules_to_save then, whichever the model has
PEFT = "0.21"  # whose keys these are
READ, INERT = "read", "inert"

# READ, INERT (without effect on what a loaded adapter computes), or the values that can be read; others are refused.
KEYS: dict[str, Any] = {
    "peft_type": READ,
    "r": READ,
    "lora_alpha": READ,
    "lora_dropout": READ,
    "use_rslora": READ,
    "rank_pattern": READ,
    "alpha_pattern": READ,
    "init_lora_weights": READ,
    "target_modules": READ,
    "exclude_modules": READ,
    "layers_to_transform": READ,
    "layers_pattern": READ,
    "modules_to_save": READ,
    "target_parameters": READ,
    # who wrote it, for what, how it started
    "auto_mapping": INERT,
    "base_model_name_or_path": INERT,
    "revision": INERT,
    "peft_version": INERT,
    "inference_mode": INERT,
    "runtime_config": INERT,
    "loftq_config": INERT,  # these four say how to start; INITS has what the start did to the base
    "eva_config": INERT,
    "corda_config": INERT,
    "lora_ga_config": INERT,
    "fan_in_fan_out": INERT,  # PEFT sets it to False for a linear layer
    "ensure_weight_tying": INERT,  # how tied matrices were saved; the tensors show it
    "qalora_group_size": INERT,  # of use_qalora
    "megatron_core": INERT,  # of megatron_config
    "merge_weights": INERT,  # peft 0.2: merge while evaluating
    # a head on top belongs to the other tasks; that of SEQ_CLS is an encoder's (io/peft refuses it for decoders)
    "task_type": (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", CLASSES),
    "bias": (None, "none", "all", "lora_only"),  # models here have no biases; a bias in the file is an unknown tensor
    # other arithmetic than W + scale * B A
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
    "enable_lora": (None, []),  # peft 0.2: parts of a fused projection
    # other modules, or other layers
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "megatron_config": (None, {}),
}
# What a newer peft writes under a new key where its new thing is not asked for.
_NOTHING: tuple[Any, ...] = (None, False, [], {})

_CONVERT = (
    "convert it in peft with the adapter that was saved before training: save_pretrained(..., "
    "path_initial_model_for_weight_conversion=DIR) writes a plain LoRA of twice the rank"
)
_MERGE = "merge it in peft (merge_and_unload) and take the result as the model"
# How init_lora_weights left the base: None as it was, PISSA or OLORA so that it can be made again, else why it cannot.
INITS: dict[Any, str | None] = {
    True: None,
    False: None,
    None: None,
    "gaussian": None,
    "eva": None,
    "orthogonal": None,
    "mica": None,
    PISSA: PISSA,
    OLORA: OLORA,
    "pissa_niter_N": f"its base was changed by a randomized decomposition, which cannot be made again: {_CONVERT}",
    "corda": f"its base was changed along data that the folder does not hold: {_CONVERT}",
    "lora_ga": f"its base was changed along gradients that the folder does not hold: {_CONVERT}",
    "loftq": f"its base was quantized by LoftQ, which is not done here: {_MERGE}",
}
_ANY_CASE = ("gaussian", OLORA, "mica")  # which PEFT compares in lower case

_MOST_BYTES = 1_000_000  # of the file: a pattern for every module of a large model takes a tenth
_LARGEST_RANK = 2**20
_LARGEST_ALPHA = 1e30
_MATRICES = {
    "embed_tokens": "embed_tokens", "model.embed_tokens": "embed_tokens", "lm_head": "lm_head",
    "wte": "embed_tokens", "word_embeddings": "embed_tokens", "embed_in": "embed_tokens", "embed_out": "lm_head",
}  # fmt: skip
_LLAMA_TARGETS = ("q_proj", "v_proj")  # PEFT's choice where target_modules is null
_LAYER_LISTS = ("layers", "model.layers")  # names of the list of layers, for layers_pattern


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, as PEFT understands it.

    residual: "", or the initialisation whose part the base must lack (qlora_jax.residual).
    targets, excluded: an expression over whole names, or names and ends of names.
    layers: indices of the layers that `targets` is about; None is all.
    ranks, alphas: expression over the end of a name -> its own rank or alpha; the first that matches counts.
    """

    where: str
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    residual: str
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: frozenset[int] | None
    modules_to_save: tuple[str, ...]  # of MODULES
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    has_head: bool = False  # over classes, which trained whole
    parameters: tuple[str, ...] = ()  # names, and ends of names, of parameters that carry an adapter of their own

    def placed(self, modules: Mapping[str, int | None]) -> dict[str, tuple[int, float]]:
        """The modules that carry an adapter.

        Args:
          modules: a module's full name ("model.layers.0.self_attn.q_proj") -> index of its layer, None outside of them.
        Returns:
          full name -> (rank, alpha), in the order of `modules`.
        Raises:
          InputError: an expression cannot be matched.
        """
        names = list(modules)
        picked = self._named("target_modules", self.targets, modules)
        if self.layers is not None:  # a name in full is taken whatever its layer
            picked = {name for name in picked if name in self.targets or modules[name] in self.layers}
        picked -= self._named("exclude_modules", self.excluded, modules)
        saved = [name for name in names if modules[name] is None and _MATRICES.get(_last(name)) in self.modules_to_save]
        placed = [name for name in names if name in picked and name not in saved]
        ranks = self._first_match("rank_pattern", self.ranks, placed)
        alphas = self._first_match("alpha_pattern", self.alphas, placed)
        return {name: (ranks.get(name, self.rank), alphas.get(name, self.alpha)) for name in placed}

    def placed_parameters(self, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """As `placed`, of parameters by their full names ("model.layers.0.mlp.experts.gate_up_proj").

        Raises InputError for a name in target_parameters that none of them has.
        """
        ends = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in self.parameters}
        if absent := [target for target, picked in ends.items() if not picked]:
            raise InputError(
                f"{self.where}: target_parameters has {_shown(absent[0])}; adapters are read on those of experts"
                + (f" ({', '.join(sorted({name.rpartition('.')[2] for name in names}))})" if names else "")
            )
        picked = [name for name in names if any(name in found for found in ends.values())]
        ranks = self._first_match("rank_pattern", self.ranks, picked)
        alphas = self._first_match("alpha_pattern", self.alphas, picked)
        return {name: (ranks.get(name, self.rank), alphas.get(name, self.alpha)) for name in picked}

    def _named(self, key: str, wanted: str | tuple[str, ...], modules: Mapping[str, int | None]) -> set[str]:
        names = list(modules)
        if not isinstance(wanted, str):
            whole, ends = frozenset(wanted), tuple("." + end for end in wanted)
            return {name for name in names if name in whole or name.endswith(ends)}
        if key == "target_modules" and wanted.lower() == "all-linear":
            return {name for name in names if modules[name] is not None}
        self._match(key, wanted, names)  # an expression by itself, not only inside the next one
        return self._match(key, f"^(?:{wanted})$", names)

    def _first_match(self, key: str, patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for pattern, value in patterns.items():
            for name in self._match(key, rf"^(?:(.*\.)?({pattern})$)", names):
                found.setdefault(name, value)
        return found

    def _match(self, key: str, pattern: str, names: Sequence[str]) -> set[str]:
        import pyarrow
        from pyarrow import compute

        try:
            hits = compute.match_substring_regex(pyarrow.array(names), pattern).to_pylist() if names else []
        except (pyarrow.ArrowInvalid, UnicodeError) as error:
            raise InputError(
                f"{self.where}: {key} has an expression that cannot be matched ({_shown(str(error), 160)}): write it "
                "without lookaround and back-references, or as names of modules"
            ) from error
        return {name for name, hit in zip(names, hits, strict=True) if hit}


def read_config(folder: Path) -> AdapterConfig:
    """The adapter_config.json of a PEFT folder.

    Raises InputError, naming file and key, when there is none, it is of another kind of adapter, or it asks for what is
    not computed here: an unknown key counts, unless its value asks for nothing.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path} is missing; expected a PEFT folder: {CONFIG} and adapter_model.safetensors")
    if path.stat().st_size > _MOST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes; expected {_MOST_BYTES:,} at most")
    file = _File(str(path), read_json(path))
    if file.raw.get("peft_type") != "LORA":
        raise file.wrong("peft_type", "LORA, the one kind of adapter that is read")
    file.check_keys()
    targets, layers, parameters = file.selection("target_modules"), file.layers(), file.parameters()
    if isinstance(targets, str) and layers is not None:
        raise file.wrong("layers_to_transform", "null, as target_modules is one expression")
    return AdapterConfig(
        where=file.where,
        rank=file.rank("r", file.raw.get("r", 8)),
        alpha=file.alpha("lora_alpha", file.raw.get("lora_alpha", 8)),
        dropout=file.dropout(),
        use_rslora=file.use_rslora(),
        residual=file.residual(),
        targets=(() if parameters else _LLAMA_TARGETS) if targets is None else targets,
        excluded=file.selection("exclude_modules") or (),
        layers=layers,
        modules_to_save=file.modules_to_save(),
        has_head=file.raw.get("task_type") == CLASSES or HEADS[0] in (file.raw.get("modules_to_save") or ()),
        ranks={name: file.rank("rank_pattern", value) for name, value in file.pattern("rank_pattern").items()},
        alphas={name: file.alpha("alpha_pattern", value) for name, value in file.pattern("alpha_pattern").items()},
        parameters=parameters,
    )


class _File:
    """The file's keys as values of the right kind. Each method raises InputError for another kind."""

    def __init__(self, where: str, raw: dict[str, Any]):
        self.where, self.raw = where, raw

    def wrong(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.where}: {key} is {_shown(self.raw.get(key))}; expected {expected}")

    def check_keys(self) -> None:
        """All keys are known or say nothing, and none asks for what is not computed here."""
        for key, value in self.raw.items():
            if key not in KEYS and not _is_one_of(value, _NOTHING):
                near = difflib.get_close_matches(key, KEYS, 1)
                hint = f"the nearest known one is {near[0]}" if near else f"peft {PEFT} has none of that name"
                raise InputError(
                    f"{self.where}: unknown key {_shown(key)} with the value {_shown(value)} ({hint}): mend its name, "
                    f"or {_MERGE}"
                )
        asked = [
            f"{key}={_shown(self.raw[key])}"
            for key, values in KEYS.items()
            if isinstance(values, tuple) and key in self.raw and not _is_one_of(self.raw[key], values)
        ]
        if asked:
            raise InputError(f"{self.where}: {', '.join(asked)} is not supported; {_MERGE}")

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST_RANK:
            raise self.wrong(key, f"whole numbers from 1 to {_LARGEST_RANK:,}")
        return value

    def alpha(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_ALPHA:
            raise self.wrong(key, "positive numbers")
        return float(value)

    def dropout(self) -> float:
        value = self.raw.get("lora_dropout", 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.wrong("lora_dropout", "a probability from 0 to below 1")
        return float(value)

    def use_rslora(self) -> bool:
        value = self.raw.get("use_rslora", False)
        if not _is_one_of(value, (True, False, None)):
            raise self.wrong("use_rslora", "true or false")
        return bool(value)

    def residual(self) -> str:
        """What INITS says of init_lora_weights: "", PISSA or OLORA."""
        value = self.raw.get("init_lora_weights", True)
        name = value.lower() if isinstance(value, str) and value.lower() in _ANY_CASE else value
        if isinstance(name, str) and name.startswith("pissa_niter_"):
            name = "pissa_niter_N"
        if not _is_one_of(name, tuple(INITS)):
            raise self.wrong("init_lora_weights", f"one of {', '.join(map(json.dumps, INITS))}")
        kind = INITS[name]
        if kind not in (None, PISSA, OLORA):
            raise InputError(f"{self.where}: init_lora_weights is {_shown(value)}: {kind}")
        return kind or ""

    def selection(self, key: str) -> str | tuple[str, ...] | None:
        """An expression, or names."""
        value = self.raw.get(key)
        return value if isinstance(value, str) or value is None else self._names(key)

    def layers(self) -> frozenset[int] | None:
        """layers_to_transform, of the list that layers_pattern names."""
        value = self.raw.get("layers_to_transform")
        indices = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int for index in indices):
            raise self.wrong("layers_to_transform", "indices of layers")
        patterns = self._names("layers_pattern")
        if indices and patterns and not {*patterns} & {*_LAYER_LISTS}:
            raise self.wrong("layers_pattern", f"null or {_LAYER_LISTS[0]!r}, the list of layers")
        return frozenset(indices) or None

    def parameters(self) -> tuple[str, ...]:
        return self._names("target_parameters")

    def modules_to_save(self) -> tuple[str, ...]:
        named = self._names("modules_to_save")
        heads = HEADS if HEADS[0] in named else ()
        if other := [name for name in named if name not in (*_MATRICES, *heads)]:
            readable = " and ".join((*MODULES, HEADS[0]))
            raise InputError(f"{self.where}: modules_to_save has {_shown(other[0])}; readable are {readable}")
        saved = {_MATRICES[name] for name in named if name not in HEADS}
        return tuple(name for name in MODULES if name in saved)

    def pattern(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object of names and numbers")
        return value or {}

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key)
        names = [value] if isinstance(value, str) and key == "layers_pattern" else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.wrong(key, "a list of names")
        return tuple(names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is there, of the same type: 0 is not false."""
    return any(type(value) is type(other) and value == other for other in values)


def _shown(value: Any, most: int = 80) -> str:
    shorten = reprlib.Repr(maxstring=most, maxother=most)
    return shorten.repr(value)
