"""The tokenizer of a checkpoint folder: text to ids and back, whichever files the folder has.

Encoding adds nothing by itself and plain text never turns into control tokens; BOS and EOS come in where the
caller asks for them. A chat template's own control tokens are recognised, those inside a message are not, but for those
that an assistant may say itself (chat_guard).
"""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.io.folder import TOKENIZERS, is_of_bytes
from qlora_jax.text import chat_template, tokenizer_files
from qlora_jax.text.chat_guard import Guard, is_thinking, spoken
from qlora_jax.text.decode_stream import DecodeStream
from qlora_jax.text.merges import MERGES, MergesBackend
from qlora_jax.text.ranked import is_ranks, read_ranks
from qlora_jax.text.tokenizer_backends import (
    Backend,
    ByteBackend,
    Encoding,
    JsonBackend,
    SentencePieceBackend,
    TekkenBackend,
)


def _one_of_the_files() -> str:
    return f"{', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}"


class Tokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the highest id.
      bos_id: id of the begin token; None for a tokenizer that has none.
      prefix: ids that the tokenizer itself puts before a text (in transformers, unless add_special_tokens is False):
        often BOS, and for many none, also where there is a BOS.
      eos_id: id that ends a training example.
      ends_source: its model is an encoder-decoder (T5), whose prompts end with EOS too and begin with nothing.
      eos_ids: every id at which generation stops, `eos_id` first.
      chat_template: Jinja source, or None.
      controls: id -> text of every control token.
      thinking: those of `controls` that stand around an assistant's reasoning.
    """

    def __init__(self, backend: Backend, settings: tokenizer_files.Settings) -> None:
        self._backend = backend
        self._settings = settings
        self.vocab_size = backend.vocab_size
        self.bos_id = settings.bos_id
        self.prefix = settings.prefix
        self.eos_id = settings.eos_ids[0]
        self.eos_ids = settings.eos_ids
        self.ends_source = settings.ends_source
        self.chat_template = settings.chat_template
        self.controls = {number: text for text, number in backend.specials.items()}
        self.thinking = {number: text for number, text in self.controls.items() if is_thinking(text)}
        self._guards: dict[str | None, Guard] = {}  # by the template, which may be exchanged

    @property
    def is_ranked(self) -> bool:
        """Whether its files are strings and their ranks, to which nothing is added."""
        return self._backend.is_ranked

    @classmethod
    def from_folder(cls, folder: str | Path, model: str | Path | None = None) -> "Tokenizer":
        """Reads the first of TOKENIZERS that is there, and the settings beside it.

        `model`: the folder whose config.json and generation_config.json say what the tokenizer's files leave open, if
        that is another (an adapter's folder has a tokenizer and no model).

        Raises:
          InputError: none is there, one is damaged, or no end token is known.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected one with {_one_of_the_files()}")
        files = tokenizer_files.read(folder, None if model is None else Path(model).expanduser())
        backend: Backend
        if (folder / "tokenizer.json").is_file():
            backend = JsonBackend(folder / "tokenizer.json", files.control_tokens(), files.stops())
        elif (file := folder / "tokenizer.model").is_file() and is_ranks(file):
            backend = JsonBackend(file, files.control_tokens(), spec=read_ranks(file, files.added_tokens()))
        elif file.is_file() or (file := folder / "spiece.model").is_file():
            backend = SentencePieceBackend(file, files.added_tokens())
        elif (folder / "tekken.json").is_file():
            backend = TekkenBackend(folder / "tekken.json")
        elif (folder / MERGES).is_file():
            backend = MergesBackend(folder, files)
        elif is_of_bytes(folder):
            backend = ByteBackend(folder, files.sentinels())
        else:
            raise InputError(f"{folder} has no tokenizer: expected {_one_of_the_files()} there")
        return cls(backend, files.settings(backend))

    def id_of(self, text: str) -> int | None:
        """Id of the token with exactly this text; None where the vocabulary has none."""
        return self._backend.id_of(text)

    def is_control(self, text: str) -> bool:
        """Whether it is a control token's text, which plain text never turns into."""
        return text in self._backend.specials

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a plain text; `bos` and `eos` put those tokens around it (no BOS for a model without one)."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + self._backend.encode_plain([text])[0] + ([self.eos_id] if eos else [])

    def encode_source(self, text: str) -> list[int]:
        """Ids of a prompt as an example of training has it: after BOS, or before EOS where the model is a T5."""
        return self.encode(text, bos=not self.ends_source, eos=self.ends_source)

    def encode_from_start(self, text: str) -> list[int]:
        """Ids of a plain text as transformers begins it: after `prefix`."""
        return [*self.prefix, *self.encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many plain texts, nothing added, on all cores."""
        return self._backend.encode_plain(texts) if texts else []

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the control tokens' texts stand for the control tokens, as transformers reads it."""
        return self._backend.encode_marked([text])[0].ids

    def content(self) -> bytes:
        """All that decides what a text becomes: equal for equal tokenizers, wherever their files are."""
        s = self._settings
        settings = [s.bos_id, list(s.eos_ids), sorted(s.special_tokens.items()), s.chat_template, s.tool_template]
        ends = [True] if self.ends_source else []  # nothing of other models
        return self._backend.content() + json.dumps(settings + ends).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens leave nothing, bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids])

    def stream(self, context: Sequence[int] = (), written: Mapping[int, str] | None = None) -> DecodeStream:
        """Decodes ids as they come. `context`: the ids before them, where the text goes on from it; `written`: control
        tokens that are shown, as these texts."""
        skipped = frozenset(self._backend.specials.values()) | set(self.eos_ids)
        return DecodeStream(self.decode, context, skipped, written)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation {"role", "content"}, ... as text; control tokens inside a message are not guarded.

        Raises:
          InputError: the folder has no chat template, or it refuses the conversation.
        """
        return self._render(messages, add_generation_prompt).text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        now: datetime.date | None = None,
    ) -> chat_template.Rendered:
        """The conversation as text with its generation marks, for `unguard`. `messages` and `tools` come from
        `guard_chat`; `now`: the day for templates that write it, None is today."""
        return self._render(messages, add_generation_prompt, tools, now)

    def guard_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Messages and tools, the control tokens' texts in them guarded. Raises InputError for noncharacters."""
        guard = self._guard
        return [guard.message(message) for message in messages], guard.guard(tools)

    def unguard(self, text: str, cuts: Sequence[int] = ()) -> tuple[str, list[int], bool]:
        """A text of `render_chat` and rising places in it -> the same for `encode_unguarded`, and how the text names
        its control tokens. Raises InputError when the template takes a guarded text apart."""
        return self._guard.unguard(text, cuts)

    def shown(self, text: str) -> str:
        """A guarded text as a reader may see it."""
        return self._guard.shown(text)

    def encode_unguarded(self, texts: Sequence[tuple[str, bool]]) -> list[Encoding]:
        """Encodings of texts of `unguard`, nothing added, on all cores."""
        encodings: dict[int, Encoding] = {}
        for numbered in (False, True):
            chosen = [n for n, (_, named) in enumerate(texts) if named == numbered]
            found = self._backend.encode_marked([texts[n][0] for n in chosen], numbered) if chosen else []
            encodings |= zip(chosen, found, strict=True)
        return [encodings[n] for n in range(len(texts))]

    @functools.cached_property
    def stops(self) -> frozenset[str]:
        """Texts of the control tokens at which generation stops."""
        return frozenset(self.controls[number] for number in self.eos_ids if number in self.controls)

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """Texts of all control tokens, the longest first."""
        return tuple(sorted(filter(None, self.controls.values()), key=len, reverse=True))

    @property
    def nameless_end(self) -> str:
        """What to add to a complaint about missing ends: a template cannot write a token that no file names."""
        template = self.chat_template or ""
        if "eos_token" not in template or "eos_token" in self._settings.special_tokens:
            return ""
        return " (it writes eos_token, which tokenizer_config.json does not name)"

    @property
    def _guard(self) -> Guard:
        if self.chat_template not in self._guards:
            searched = chat_template.searched(self.chat_template) if self.chat_template else ()
            specials = list(self._backend.specials)
            self._guards[self.chat_template] = Guard(specials, spoken(specials, searched, self.stops))
        return self._guards[self.chat_template]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        now: datetime.date | None = None,
    ) -> chat_template.Rendered:
        where = str(self._settings.folder)
        template = self._settings.tool_template if tools and self._settings.tool_template else self.chat_template
        if template is None:
            raise InputError(
                f"{where} has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja): this model was not trained for chat in a form of its own"
            )
        special = self._settings.special_tokens
        try:
            return chat_template.render(template, messages, add_generation_prompt, special, where, tools, now)
        except InputError as error:  # a template may quote a message
            raise InputError(self.shown(str(error))) from error
