"""The tokenizer of a checkpoint folder: text to ids and back, whichever files the folder has.

Encoding adds nothing by itself and plain text never turns into control tokens; BOS and EOS come in where the
caller asks for them. A chat template's own control tokens are recognised, those inside a message are not.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data import chat_template, tokenizer_files
from qlora_jax.data.decode_stream import DecodeStream
from qlora_jax.data.tokenizer_backends import (
    Backend,
    JsonBackend,
    SentencePieceBackend,
    encode_around_specials,
    special_pattern,
)
from qlora_jax.errors import InputError

# A control token's text inside a message, on its way through the template: number between two private-use characters.
_GUARDED = re.compile("\uf8f0(\\d+)\uf8f1")


class Tokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: one more than the highest id.
      bos_id: id of the begin token; None for a model that has none.
      eos_id: id that ends a training example.
      eos_ids: every id at which generation stops, `eos_id` first.
      chat_template: Jinja source, or None.
    """

    def __init__(self, backend: Backend, settings: tokenizer_files.Settings) -> None:
        self._backend = backend
        self._settings = settings
        self.vocab_size = backend.vocab_size
        self.bos_id = settings.bos_id
        self.eos_id = settings.eos_ids[0]
        self.eos_ids = settings.eos_ids
        self.chat_template = settings.chat_template

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or tokenizer.model where there is none, and the settings beside it.

        Raises:
          InputError: neither file is there, one is damaged, or no end token is known.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected one with tokenizer.json or tokenizer.model")
        files = tokenizer_files.read(folder)
        backend: Backend
        if (folder / "tokenizer.json").is_file():
            backend = JsonBackend(folder / "tokenizer.json", files.control_tokens())
        elif (folder / "tokenizer.model").is_file():
            backend = SentencePieceBackend(folder / "tokenizer.model", files.added_tokens())
        else:
            raise InputError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model there")
        return cls(backend, files.settings(backend))

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a plain text; `bos` and `eos` put those tokens around it (no BOS for a model without one)."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + self._backend.encode_plain([text])[0] + ([self.eos_id] if eos else [])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many plain texts, nothing added, on all cores."""
        return self._backend.encode_plain(texts) if texts else []

    def content(self) -> bytes:
        """All that decides what a text becomes: equal for equal tokenizers, wherever their files are."""
        s = self._settings
        settings = [s.bos_id, list(s.eos_ids), sorted(s.special_tokens.items()), s.chat_template]
        return self._backend.content() + json.dumps(settings).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens leave nothing, bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids])

    def stream(self, context: Sequence[int] = ()) -> DecodeStream:
        """Decodes ids as they come. `context`: the ids before them, where the text goes on from it."""
        return DecodeStream(self.decode, context, frozenset(self._backend.specials.values()) | set(self.eos_ids))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation {"role", "content"}, ... as text.

        Raises:
          InputError: the folder has no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise InputError(
                f"{self._settings.folder} has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja): this model was not trained for chat in a form of its own"
            )
        return chat_template.render(
            self.chat_template,
            messages,
            add_generation_prompt,
            self._settings.special_tokens,
            str(self._settings.folder),
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: the template's control tokens are ids, the same letters in a message are letters."""
        specials = list(self._backend.specials)
        pattern = special_pattern(self._backend.specials)

        def guard(content: Any) -> Any:
            if not isinstance(content, str):
                return content
            return pattern.sub(lambda match: f"\uf8f0{specials.index(match[0])}\uf8f1", content)

        guarded = [{**message, "content": guard(message.get("content"))} for message in messages]
        text = self.apply_chat_template(guarded, add_generation_prompt)
        if guarded == [dict(message) for message in messages]:
            return self._backend.encode_marked(text)
        return encode_around_specials(text, self._backend, lambda piece: _unguard(piece, specials))


def _unguard(piece: str, specials: Sequence[str]) -> str:
    return _GUARDED.sub(lambda match: specials[int(match[1])] if int(match[1]) < len(specials) else match[0], piece)
