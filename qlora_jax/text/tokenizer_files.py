"""The settings beside a tokenizer: begin and end tokens, chat template, tokens added to the model's own.

They are spread over tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
added_tokens.json; every folder has some of them. For training the tokenizer's word on its tokens goes first,
and generation stops at whatever any of them calls an end.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer_backends import Backend

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What Tokenizer takes from the files. `eos_ids` is never empty; `special_tokens` has texts by name."""

    folder: Path
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    chat_template: str | None


@dataclasses.dataclass(frozen=True)
class Files:
    """The JSON files of a folder; one that is not there is empty."""

    folder: Path
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    added: dict[str, Any]

    def token_text(self, name: str) -> tuple[bool, str | None]:
        """Whether a token such as "bos_token" is spoken of (null says that there is none), and its text."""
        for source in (self.tokenizer_config, self.special_tokens_map):
            if name in source:
                value = source[name]
                return True, value.get("content") if isinstance(value, dict) else value
        return False, None

    def control_tokens(self) -> set[str]:
        """Texts of the named control tokens."""
        return {text for name in _TOKEN_NAMES for text in (self.token_text(name)[1],) if text}

    def added_tokens(self) -> dict[str, int]:
        """Tokens beyond a SentencePiece model's own, text -> id."""
        added = {text: number for text, number in self.added.items() if isinstance(number, int)}
        for number, token in self.tokenizer_config.get("added_tokens_decoder", {}).items():
            if token.get("special"):
                added[token["content"]] = int(number)
        return added

    def settings(self, backend: Backend) -> Settings:
        """Raises InputError when nothing says which token ends a text, or when a named one is not in the vocabulary."""
        bos_ids = self._ids("bos_token", backend, backend.bos_id)
        eos_ids = self._ids("eos_token", backend, backend.eos_id)
        if not eos_ids:
            raise InputError(
                f"{self.folder}: no file says which token ends a text; expected eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        texts = {name: text for name in _TOKEN_NAMES for text in (self.token_text(name)[1],) if text}
        by_id = {number: text for text, number in backend.specials.items()}
        for name, ids in (("bos_token", bos_ids), ("eos_token", eos_ids)):
            if name not in texts and ids and ids[0] in by_id:
                texts[name] = by_id[ids[0]]
        for number in self._stops():
            if number not in eos_ids:
                eos_ids.append(number)
        return Settings(self.folder, bos_ids[0] if bos_ids else None, tuple(eos_ids), texts, self._template())

    def _ids(self, name: str, backend: Backend, own: int | None) -> list[int]:
        """The ids of a token in the order of trust; at most one unless a model's config lists several."""
        spoken, text = self.token_text(name)
        if text is not None:
            number = backend.id_of(text)
            if number is None:
                raise InputError(f"{self.folder}: {name} {text!r} is not in the tokenizer's vocabulary")
            return [number]
        for config in (self.generation_config, self.config):
            # A tokenizer that says it has no begin token is right, whatever the model's config repeats.
            if config.get(f"{name}_id") is not None and not (spoken and name == "bos_token"):
                return _as_list(config[f"{name}_id"])
        return [] if spoken or own is None else [own]

    def _stops(self) -> list[int]:
        """Ids at which generation stops by generation_config.json, or by config.json where that is silent."""
        for config in (self.generation_config, self.config):
            if config.get("eos_token_id") is not None:
                return _as_list(config["eos_token_id"])
        return []

    def _template(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        return template


def read(folder: Path, model: Path | None = None) -> Files:
    """`model`: where config.json and generation_config.json are, if elsewhere. Raises InputError when one of the files
    is there and is not a JSON object."""
    model = model or folder
    return Files(
        folder,
        _object(folder / "tokenizer_config.json"),
        _object(folder / "special_tokens_map.json"),
        _object(model / "generation_config.json"),
        _object(model / "config.json"),
        _object(folder / "added_tokens.json"),
    )


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def _as_list(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, list) else [value]
