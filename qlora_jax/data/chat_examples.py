"""Examples of conversations in the model's own chat template: the assistant's turns are learned, and nothing else.

A chat is one example where its template writes every turn as it was generated, else an example for each answer that
needs one of its own (text/chat_rows). An example has room for max_source_len + max_target_len tokens together. One that
is longer ends after the last of its answers that fits whole. If not even the first does, that answer is cut, and it is
learned without an end: nothing ended there. An example without room for a token of it is dropped.
"""

import dataclasses
import datetime
from collections.abc import Sequence

import numpy as np

from qlora_jax.data.examples import Example, Lengths
from qlora_jax.data.rows import Problems
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat
from qlora_jax.text.chat_rows import TURNS, ChatRow, rows_of
from qlora_jax.text.chat_tokens import ChatTokens, encode_rows
from qlora_jax.text.tokenizer import Tokenizer

TEMPLATES = ("auto", "paper", "chat")
_CHUNK = 1024  # chats whose texts and places of tokens exist at a time


@dataclasses.dataclass(frozen=True)
class ChatForms:
    """How chats were written.

    apart: examples of chats that need several; parted: these chats. unwritten: answers whose reasoning the template
      does not write. closed: answers without reasoning whose prompt opens it. silent: chats of which no answer is to be
      learned. unknown_ends: texts of control tokens that end turns where generation does not stop.
    """

    apart: int = 0
    parted: int = 0
    unwritten: int = 0
    closed: int = 0
    silent: int = 0
    unknown_ends: tuple[str, ...] = ()

    def __add__(self, other: "ChatForms") -> "ChatForms":
        return ChatForms(
            self.apart + other.apart,
            self.parted + other.parted,
            self.unwritten + other.unwritten,
            self.closed + other.closed,
            self.silent + other.silent,
            tuple(sorted({*self.unknown_ends, *other.unknown_ends})),
        )

    def report(self) -> list[str]:
        """Lines on it for a run's report, each only where there is something to say."""
        lines = []
        if self.apart:
            lines.append(
                f"data: the template writes an answer otherwise once others follow: {self.parted:,} chats are "
                f"{self.apart:,} examples, each answer as it is generated (data.packing puts several in a row)"
            )
        if self.unwritten:
            lines.append(f"data: the template does not write the reasoning of {self.unwritten:,} answers: not learned")
        if self.closed:
            lines.append(
                f"data: the template's prompt opens the reasoning, and {self.closed:,} answers have none: they learn "
                "to close it at once"
            )
        if self.silent:
            lines.append(f"data: {self.silent:,} chats left out: none of their answers is to be learned")
        if self.unknown_ends:
            lines.append(
                f"data: the template ends turns with {' and '.join(self.unknown_ends)}, where generation does not "
                "stop: name it in eos_token_id of generation_config.json"
            )
        return lines


@dataclasses.dataclass(frozen=True)
class ChatCuts:
    """How many examples lost answers, had their first answer cut, or had no room for it; and how chats were written."""

    shortened: int = 0
    cut: int = 0
    dropped: int = 0
    forms: ChatForms = ChatForms()

    def __add__(self, other: "ChatCuts") -> "ChatCuts":
        return ChatCuts(
            self.shortened + other.shortened,
            self.cut + other.cut,
            self.dropped + other.dropped,
            self.forms + other.forms,
        )

    def report(self, lengths: Lengths) -> list[str]:
        """Lines on it for a run's report, each only where there is something to say."""
        lines = []
        if self.shortened or self.cut or self.dropped:
            lines.append(
                f"data: cut to length ({lengths}): {self.shortened:,} chats end at an earlier answer, {self.cut:,} "
                f"first answers cut (learned without an end), {self.dropped:,} without room dropped"
            )
        return lines + self.forms.report()


def uses_chat_template(template: str, is_conversation: bool, tokenizer: Tokenizer) -> bool:
    """Whether data.template means the tokenizer's own template for rows, which are conversations without a prompt of
    the paper's, or others.

    Raises:
      InputError: an unknown template, or "chat" with a tokenizer that has none.
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown data.template {template!r}; known: {', '.join(TEMPLATES)}")
    if template == "chat" and tokenizer.chat_template is None:
        tokenizer.apply_chat_template([])  # says that there is none
    return template == "chat" or (template == "auto" and is_conversation and tokenizer.chat_template is not None)


def check_turns(turns: str) -> None:
    """Raises InputError for a data.turns that there is not."""
    if turns not in TURNS:
        raise InputError(f"unknown data.turns {turns!r}; known: {', '.join(TURNS)}")


def tokenize_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    max_len: int,
    train_on_source: bool = False,
    now: datetime.date | None = None,
    turns: str = "all",
) -> tuple[list[Example], ChatCuts]:
    """Examples of chats, in their order, without those that have no room for an answer.

    Args:
      max_len: tokens of an example.
      train_on_source: everything but the first token is learned, and but answers that are never to be.
      now: the day for templates that write it; None is today.
      turns: which answers of a chat are learned, "all" or "last".

    Raises:
      InputError: a chat cannot be learned exactly, with the number of others.
    """
    check_turns(turns)
    if max_len < 3:
        raise InputError(
            f"data.max_source_len + data.max_target_len is {max_len}, expected at least 3 (a prompt, a token, its end)"
        )
    examples: list[Example] = []
    problems = Problems()
    cuts = ChatCuts()
    for start in range(0, len(chats), _CHUNK):
        rows, forms = _rows(chats[start : start + _CHUNK], tokenizer, turns, now, train_on_source, problems)
        cuts += ChatCuts(forms=forms)
        for (where, _), tokens in zip(rows, encode_rows([row for _, row in rows], tokenizer), strict=True):
            if isinstance(tokens, InputError):
                problems.add(f"{where}: {tokens}")
                continue
            unknown = {tokens.ids[end - 1] for end in tokens.ends} - set(tokenizer.eos_ids)
            cuts += ChatCuts(forms=ChatForms(unknown_ends=tuple(sorted(tokenizer.controls[end] for end in unknown))))
            example = _fit(tokens, max_len, train_on_source, where)
            if example is not None:
                examples.append(example)
            cuts += _cut(example, tokens)
    problems.raise_if_any()
    return examples, cuts


def _rows(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    turns: str,
    now: datetime.date | None,
    train_on_source: bool,
    problems: Problems,
) -> tuple[list[tuple[str, ChatRow]], ChatForms]:
    """Rows of chats, each with the place of its chat. The reason why a chat has none goes to `problems`."""
    rows: list[tuple[str, ChatRow]] = []
    forms = ChatForms()
    for chat in chats:
        try:
            found = rows_of(chat, tokenizer, turns, now)
            if found.hidden and train_on_source:
                raise InputError(
                    "the chat template writes an answer that is not to be learned otherwise once others follow, so "
                    "data.train_on_source would learn it; leave that off for this data"
                )
        except InputError as error:
            problems.add(f"{chat.where}: {error}")
            continue
        rows += [(chat.where, row) for row in found.rows]
        count = len(found.rows)
        apart = (count, 1) if count > 1 else (0, 0)
        forms += ChatForms(*apart, found.unwritten, found.closed, silent=int(count == 0))
    return rows, forms


def _fit(tokens: ChatTokens, max_len: int, train_on_source: bool, where: str) -> Example | None:
    ids = tokens.ids
    if len(ids) > max_len:
        fitting = [end for end in tokens.ends if end <= max_len]
        if not fitting and tokens.learned[0][0] + 1 > max_len:
            return None
        ids = ids[: fitting[-1] if fitting else max_len]
    loss_mask = np.full(len(ids), train_on_source, np.bool_)
    for begin, end in tokens.learned:
        loss_mask[begin:end] = True
    for begin, end in tokens.silent:
        loss_mask[begin:end] = False
    loss_mask[0] = False  # nothing predicts it
    return Example(np.asarray(ids, np.int32), loss_mask, where)


def _cut(example: Example | None, tokens: ChatTokens) -> ChatCuts:
    """What was lost of a row."""
    if example is None:
        return ChatCuts(dropped=1)
    if len(example) >= tokens.ends[-1]:
        return ChatCuts()
    return ChatCuts(shortened=1) if len(example) in tokens.ends else ChatCuts(cut=1)
