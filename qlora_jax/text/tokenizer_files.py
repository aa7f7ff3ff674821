"""The settings beside a tokenizer: begin and end tokens, chat template, tokens added to the model's own.

They are spread over tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and
added_tokens.json; every folder has some of them. What begins a text, and what a template knows by name, is as in
transformers 5.23 (tests/golden/make_bos.py): the tokenizer's files alone decide it, nothing is guessed. An end token
every training needs: the tokenizer's word on it goes first, and generation stops at whatever any file calls an end.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import loads, read_whole
from qlora_jax.models.t5.config import DEFAULTS as T5
from qlora_jax.text.tokenizer_backends import Backend

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# What transformers' classes name where the files do not.
_DEFAULTS = {"LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What Tokenizer takes from the files. `prefix`: what the tokenizer itself puts before a text; `eos_ids` is never
    empty; `special_tokens` has texts by name, for templates; `tool_template`: the one for chats with tools, where it is
    another; `ends_source`: see Tokenizer."""

    folder: Path
    bos_id: int | None
    prefix: tuple[int, ...]
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    chat_template: str | None
    tool_template: str | None
    ends_source: bool = False


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
        # special_tokens_map.json is of old folders: it goes first, but is not asked where the other lists its tokens
        is_new = "added_tokens_decoder" in self.tokenizer_config
        for source in (self.tokenizer_config,) if is_new else (self.special_tokens_map, self.tokenizer_config):
            if name in source:
                value = source[name]
                text = value.get("content") if isinstance(value, dict) else value
                if not isinstance(text, str | None):
                    raise self._wrong(name, value, "text, or an object with it as content")
                return True, text
        return False, None

    def _wrong(self, key: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self.folder}: {key} is {reprlib.repr(value)}; expected {expected}")

    def control_tokens(self) -> set[str]:
        """Texts of the named control tokens."""
        return {text for name in _TOKEN_NAMES for text in (self.token_text(name)[1],) if text}

    def stops(self) -> list[int]:
        """Ids at which generation stops by generation_config.json, or by config.json where that is silent."""
        for config in (self.generation_config, self.config):
            if (said := config.get("eos_token_id")) is not None:
                found = list(said) if isinstance(said, list) else [said]
                if not all(_is_id(number) for number in found):
                    raise self._wrong("eos_token_id", said, "the id of a token, or a list of ids")
                return found
        return []

    def added_tokens(self) -> dict[str, int]:
        """Tokens beyond a SentencePiece model's own, text -> id."""
        if wrong := [text for text, number in self.added.items() if not _is_id(number)]:
            raise self._wrong(f"{wrong[0]!r} of added_tokens.json", self.added[wrong[0]], "the id of a token")
        added, listed = dict(self.added), self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self._wrong("added_tokens_decoder", listed, "an object of ids and tokens")
        for number, token in listed.items():
            is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
            if not (is_token and number.isascii() and number.isdigit() and len(number) < 10):
                raise self._wrong(f"{number!r} of added_tokens_decoder", token, "an id, and an object with content")
            if token.get("special"):
                added[token["content"]] = int(number)
        return added

    def sentinels(self) -> list[str]:
        """Texts of ByT5's tokens for pretraining: those that are listed, or as many as extra_ids says."""
        listed = self.tokenizer_config.get("additional_special_tokens")
        if listed is not None:
            return [token["content"] if isinstance(token, dict) else token for token in listed]
        count = self.tokenizer_config.get("extra_ids", 125)
        if type(count) is not int or count < 0:
            raise InputError(f"{self.folder}/tokenizer_config.json: extra_ids is {count!r}; expected a count")
        return [f"<extra_id_{number}>" for number in range(count)]

    def settings(self, backend: Backend) -> Settings:
        """Raises InputError when nothing says which token ends a text, or when a named one is not in the vocabulary."""
        named = self._named(backend)
        bos_id = self._id_of("bos_token", named, backend)
        prefix = backend.prefix
        if prefix is None:  # a SentencePiece model knows no post-processor
            asked = self.tokenizer_config.get("add_bos_token") is True and bos_id is not None
            prefix = (bos_id,) if asked and bos_id is not None else ()
        if bos_id is None and len(prefix) == 1:
            bos_id = prefix[0]
        eos_ids = self._ends(named, backend)
        if not eos_ids:
            raise InputError(
                f"{self.folder}: no file says which token ends a text; expected eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )
        eos_ids += [number for number in self.stops() if number not in eos_ids]
        named_as = self.config.get("architectures")
        is_pair = isinstance(named_as, list) and any(name in named_as for name in T5)
        return Settings(self.folder, bos_id, prefix, tuple(eos_ids), named, *self._templates(), is_pair)

    def _named(self, backend: Backend) -> dict[str, str]:
        """Texts of the tokens that transformers knows by a name."""
        declared = self.tokenizer_config.get("tokenizer_class") or self.config.get("tokenizer_class") or ""
        if not isinstance(declared, str):
            raise self._wrong("tokenizer_class", declared, "a name")
        defaults = backend.defaults | (_DEFAULTS.get(declared.removesuffix("Fast"), {}) if not backend.is_bytes else {})
        own = {name: text for name, text in self.tokenizer_config.items() if name.endswith("_token")}
        found = {}
        for name in (*_TOKEN_NAMES, *(name for name, text in own.items() if isinstance(text, str))):
            is_spoken_of, text = self.token_text(name)
            if not is_spoken_of and backend.id_of(defaults.get(name, "")) is not None:
                text = defaults.get(name)
            if text:
                found[name] = text
        return found

    def _ends(self, named: dict[str, str], backend: Backend) -> list[int]:
        """The end tokens in the order of trust; at most one unless a model's config lists several."""
        number = self._id_of("eos_token", named, backend)
        if number is not None:
            return [number]
        if self.stops():
            return self.stops()
        return [] if self.token_text("eos_token")[0] or backend.eos_id is None else [backend.eos_id]

    def _id_of(self, name: str, named: dict[str, str], backend: Backend) -> int | None:
        if name not in named:
            return None
        number = backend.id_of(named[name])
        if number is None:
            raise InputError(f"{self.folder}: {name} {named[name]!r} is not in the tokenizer's vocabulary")
        return number

    def _templates(self) -> tuple[str | None, str | None]:
        """The chat template, and the one for chats with tools where it is another."""
        template = self.tokenizer_config.get("chat_template")
        listed = template if isinstance(template, list) else [{"name": "default", "template": template}]
        is_whole = [isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in listed]
        if not all(is_whole) or not all(isinstance(entry.get("template"), str | None) for entry in listed):
            raise self._wrong("chat_template", template, "text, or a list of objects with name and template")
        named: dict[Any, str | None] = {entry["name"]: entry.get("template") for entry in listed}
        files = {"default": self.folder / "chat_template.jinja"}
        files["tool_use"] = self.folder / "additional_chat_templates" / "tool_use.jinja"
        found: dict[str, str | None] = {name: _text(file) for name, file in files.items() if file.is_file()}
        named = found or named  # the files go first, all together
        return named.get("default"), named.get("tool_use")


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
        value = loads(read_whole(file))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value


def _text(file: Path) -> str:
    try:
        return read_whole(file).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start})") from error


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
