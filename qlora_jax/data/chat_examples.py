"""Examples of conversations in the model's own chat template: the assistant's turns are learned, and nothing else.

A chat has room for max_source_len + max_target_len tokens together. One that is longer ends after the last of the
assistant's turns that fits whole. If not even the first does, that turn is cut and keeps the token that ends
it; a chat without room for a token of it is dropped.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.data.rows import Problems
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_spans import Spans, assistant_spans
from qlora_jax.text.chat_tokens import ChatTokens, encode_spans
from qlora_jax.text.tokenizer import Tokenizer

TEMPLATES = ("auto", "paper", "chat")
_CHATS = ("messages", "sharegpt")  # formats without a prompt of the paper's
_CHUNK = 1024  # chats whose texts and places of tokens exist at a time


@dataclasses.dataclass(frozen=True)
class ChatCuts:
    """How many chats lost turns, had their first answer cut, or had no room for it; and the texts of control tokens
    that end turns where generation does not stop."""

    shortened: int = 0
    cut: int = 0
    dropped: int = 0
    unknown_ends: tuple[str, ...] = ()

    def __add__(self, other: "ChatCuts") -> "ChatCuts":
        return ChatCuts(
            self.shortened + other.shortened,
            self.cut + other.cut,
            self.dropped + other.dropped,
            tuple(sorted({*self.unknown_ends, *other.unknown_ends})),
        )

    def report(self, config: Any) -> list[str]:
        """Lines on it for a run's report, each only where there is something to say."""
        lines = []
        if self.shortened or self.cut or self.dropped:
            room = config.max_source_len + config.max_target_len
            lines.append(
                f"data: cut to length ({room} tokens, max_source_len + max_target_len): {self.shortened:,} chats end "
                f"at an earlier answer, {self.cut:,} first answers cut, {self.dropped:,} chats without room dropped"
            )
        if self.unknown_ends:
            lines.append(
                f"data: the template ends turns with {' and '.join(self.unknown_ends)}, where generation does not "
                "stop: name it in eos_token_id of generation_config.json"
            )
        return lines


def uses_chat_template(template: str, format: str, tokenizer: Tokenizer) -> bool:
    """Whether data.template means the tokenizer's own template for a format.

    Raises:
      InputError: an unknown template, or "chat" with a tokenizer that has none.
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown data.template {template!r}; known: {', '.join(TEMPLATES)}")
    if template == "chat" and tokenizer.chat_template is None:
        tokenizer.apply_chat_template([])  # says that there is none
    return template == "chat" or (template == "auto" and format in _CHATS and tokenizer.chat_template is not None)


def tokenize_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    max_len: int,
    train_on_source: bool = False,
    now: datetime.date | None = None,
) -> tuple[list[Example], ChatCuts]:
    """Examples of chats, in their order, without those that have no room for an answer.

    Args:
      max_len: tokens of a chat.
      train_on_source: everything but the first token is learned.
      now: the day for templates that write it; None is today.

    Raises:
      InputError: a chat cannot be masked exactly, with the number of others.
    """
    if max_len < 3:
        raise InputError(
            f"data.max_source_len + data.max_target_len is {max_len}, expected at least 3 (a prompt, a token, its end)"
        )
    examples: list[Example] = []
    problems = Problems()
    shortened = cut = dropped = 0
    ends: set[int] = set()
    for start in range(0, len(chats), _CHUNK):
        chunk = chats[start : start + _CHUNK]
        for chat, tokens in zip(chunk, _tokens(chunk, tokenizer, now, problems), strict=True):
            if tokens is None:
                continue
            ends.update(tokens.ids[end - 1] for end in tokens.ends)
            example = _fit(tokens, max_len, train_on_source, chat.where)
            if example is None:
                dropped += 1
                continue
            examples.append(example)
            if len(example) < tokens.ends[-1]:
                shortened += len(example) in tokens.ends
                cut += len(example) not in tokens.ends
    problems.raise_if_any()
    unknown = sorted(tokenizer.controls[end] for end in ends - set(tokenizer.eos_ids))
    return examples, ChatCuts(shortened, cut, dropped, tuple(unknown))


def _tokens(
    chats: Sequence[Chat], tokenizer: Tokenizer, now: datetime.date | None, problems: Problems
) -> list[ChatTokens | None]:
    """Tokens of chats; None for one that cannot be masked, whose reason goes to `problems`."""
    rendered: list[Spans] = []
    good: list[int] = []
    for number, chat in enumerate(chats):
        try:
            rendered.append(assistant_spans(chat, tokenizer, now))
            good.append(number)
        except InputError as error:
            problems.add(f"{chat.where}: {error}")
    found: list[ChatTokens | None] = [None] * len(chats)
    for number, tokens in zip(good, encode_spans(rendered, tokenizer), strict=True):
        if isinstance(tokens, InputError):
            problems.add(f"{chats[number].where}: {tokens}")
        else:
            found[number] = tokens
    return found


def _fit(tokens: ChatTokens, max_len: int, train_on_source: bool, where: str) -> Example | None:
    ids = tokens.ids
    if len(ids) > max_len:
        fitting = [end for end in tokens.ends if end <= max_len]
        if fitting:
            ids = ids[: fitting[-1]]
        elif tokens.learned[0][0] + 2 <= max_len:
            ids = [*ids[: max_len - 1], ids[tokens.ends[0] - 1]]
        else:
            return None
    loss_mask = np.full(len(ids), train_on_source, np.bool_)
    for begin, end in tokens.learned:
        loss_mask[begin:end] = True
    loss_mask[0] = False  # nothing predicts it
    return Example(np.asarray(ids, np.int32), loss_mask, where)
