"""From the rows of a data set to texts: what is given, and what is learned.

A format is a function of a row that gives its examples, entered in FORMATS by its name in the config with the columns
that it reads. It raises InputError naming file, line and field when the row is not of the format, and gives none for a
row that rightly has nothing to learn.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qlora_jax.data.fields import Pair, is_empty
from qlora_jax.data.forms import chats, conversations, instructions, super_natural, trl
from qlora_jax.data.forms.columns import SYSTEM, TOOLS, refuse_unread
from qlora_jax.data.glue.tasks import FORMAT as GLUE
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat


@dataclasses.dataclass(frozen=True)
class Format:
    """One form of rows.

    Attributes:
      pairs: a row's examples in the paper's form. chats: its conversations for a chat template; None: a question and
        its answer, as `pairs` has them.
      reads: the columns that both read. chats_read: those that `chats` reads besides.
      passes: columns that carry meaning elsewhere (forms/columns) and none here.
      is_conversation: whether a row has turns and no prompt of the paper's: then the model's chat template is the first
        choice.
      note: what a run's report has to say of the format.
    """

    pairs: Callable[[Row], list[Pair]]
    reads: tuple[str, ...]
    chats: Callable[[Row], list[Chat]] | None = None
    chats_read: tuple[str, ...] = SYSTEM
    passes: tuple[str, ...] = ()
    is_conversation: Callable[[Row], bool] = lambda row: False
    note: str = ""

    def read_pairs(self, row: Row) -> list[Pair]:
        """Raises InputError as `pairs` does, and for a column that carries meaning and is not read."""
        made = self.pairs(row)
        mend = "set data.template=chat, which reads it"
        refuse_unread(row, (*self.reads, *self.passes), "the paper's form of this format", self.chats_read, mend)
        return made

    def read_chats(self, row: Row) -> list[Chat]:
        """Raises InputError as `read_pairs` does."""
        made = (self.chats or chats.from_pairs(self.pairs))(row)
        refuse_unread(row, (*self.reads, *self.chats_read, *self.passes), "this format")
        return made


_INPUT_OUTPUT = Format(instructions.input_output, ("input", "output"))
# what rows of chats have besides are copies of their turns, as in Magpie's data and UltraChat
_COPIES = ("instruction", "input", "context")
_CHOSEN = "of each pair the chosen answer is learned, as if there were no other; rejected is not used"


def _always(row: Row) -> bool:
    return True


FORMATS: dict[str, Format] = {
    "alpaca": Format(instructions.alpaca, ("instruction", "input", "output"), chats.alpaca, (*SYSTEM, "history")),
    "input-output": _INPUT_OUTPUT,
    "oasst1": Format(conversations.oasst1, ("prompt", "text", "replies", "role"), chats.oasst1, (), passes=("labels",)),
    "hh-rlhf": Format(conversations.hh_rlhf, ("chosen",), chats.hh_rlhf, (), ("rejected",), note=_CHOSEN),
    "self-instruct": Format(
        instructions.self_instruct, ("prompt", "completion", "target", "instruction", "instances"), passes=("input",)
    ),
    "unnatural-instructions": Format(
        instructions.unnatural_instructions, ("instruction", "instances", "reformulations")
    ),
    "flan-v2": Format(instructions.flan_v2, (*instructions.FLAN_COLUMNS, "inputs", "targets")),
    "chip2": Format(instructions.chip2, ("text",)),
    "longform": _INPUT_OUTPUT,
    "dolly": Format(instructions.dolly, ("instruction", "context", "response", "prompt", "answer")),
    "messages": Format(conversations.messages, ("messages", *SYSTEM), chats.messages, TOOLS, _COPIES, _always),
    "sharegpt": Format(conversations.sharegpt, ("conversations", *SYSTEM), chats.sharegpt, TOOLS, _COPIES, _always),
    "prompt-completion": Format(
        trl.prompt_completion,
        ("prompt", "completion"),
        trl.prompt_completion_chats,
        (*SYSTEM, *TOOLS),
        is_conversation=trl.is_conversational,
    ),
    "preference": Format(
        trl.preference,
        ("prompt", "chosen"),
        trl.preference_chats,
        (*SYSTEM, *TOOLS),
        ("rejected",),
        trl.is_conversational,
        _CHOSEN,
    ),
    "super-natural-instructions": Format(
        super_natural.super_natural,
        ("Definition", "Positive Examples", "Negative Examples", "Instances", "definition", "inputs", "targets"),
        note=f"of each task at most {super_natural.INSTANCES} instances, each with its definition and at most "
        f"{super_natural.POSITIVE_EXAMPLES} examples",
    ),
    "text": Format(trl.plain_text, ("text",), trl.plain_text_chats, ()),
}

# Columns of .tsv files that come without a header, by format.
COLUMNS: dict[str, tuple[str, ...]] = {"flan-v2": instructions.FLAN_COLUMNS}

# What is done to all rows of a data set before its format reads them one by one.
_GATHER: dict[str, Callable[[Sequence[Row]], list[Row]]] = {"oasst1": conversations.gather_messages}


@dataclasses.dataclass(frozen=True)
class Text:
    """A pair and the place of its row; `given` and `shorter` as of Pair."""

    source: str
    target: str
    where: str
    given: tuple[tuple[int, int], ...] = ()
    shorter: tuple[str, ...] = ()


def check_format(format: str) -> None:
    """Raises InputError when there is no such format."""
    if format not in (*FORMATS, GLUE):
        raise InputError(f"unknown data.format {format!r}; known formats: {', '.join((*FORMATS, GLUE))}, or auto")


def format_rows(rows: Iterable[Row], format: str) -> tuple[list[Text], int]:
    """Every example of every row as text, and the number of rows left out because they have nothing to learn.

    Raises InputError as `stream_texts` does.
    """
    texts = list(stream_texts(rows, format))
    return [text for of_row in texts for text in of_row], sum(not of_row for of_row in texts)


def stream_texts(rows: Iterable[Row], format: str) -> Iterator[list[Text]]:
    """The examples of each row, none for a row that has nothing to learn; nothing more comes after a bad row.

    No more than a row is held, but for formats that gather the rows of one conversation (oasst1).

    Raises:
      InputError: an unknown format, or the first bad row (file, line, reason) with the count of the others, and the
        formats that can read that row, when all rows were read.
    """
    for row, pairs in _read_all(rows, format, Format.read_pairs):
        yield [Text(pair.source, pair.target, row.where, pair.given, pair.shorter) for pair in pairs]


def stream_chats(rows: Iterable[Row], format: str) -> Iterator[list[Chat]]:
    """The conversations of each row, for a chat template; see `stream_texts`."""
    return (made for _, made in _read_all(rows, format, Format.read_chats))


def _read_all(rows: Iterable[Row], format: str, read: Callable[[Format, Row], Any]) -> Iterator[tuple[Row, Any]]:
    check_format(format)
    if format == GLUE:
        raise InputError("rows of data.format=glue have labels and no answers: they are for encoders such as RoBERTa")
    problems = Problems()
    first_bad: Row | None = None
    for row in _GATHER[format](list(rows)) if format in _GATHER else rows:
        try:
            made = read(FORMATS[format], row)
        except InputError as error:
            problems.add(str(error))
            first_bad = first_bad or row
            continue
        if first_bad is None:
            yield row, made
    problems.raise_if_any(_fitting(first_bad, format, read) if first_bad else "")


def _fitting(row: Row, asked: str, read: Callable[[Format, Row], Any]) -> str:
    """The formats that read a row, as the end of an error: none that would leave out what the asked one reads, or what
    another of them does."""
    said = {name for name, value in row.fields.items() if not is_empty(value)}
    fitting = {
        name: said & set(format.reads)
        for name, format in FORMATS.items()
        if name != "longform" and said & set(FORMATS[asked].reads) <= set(format.reads) and _reads(format, row, read)
    }
    names = [name for name, mine in fitting.items() if not any(mine < others for others in fitting.values())]
    return f"; data.format={' or '.join(names)} reads it" if names else ""


def _reads(format: Format, row: Row, read: Callable[[Format, Row], Any]) -> bool:
    try:
        return bool(read(format, row))
    except InputError:
        return False
