"""A data set as tokens on disk (feed/cache): read from there, or made on the way.

A set whose files are here is one entry. Of a set on the hub that is streamed each file is one: it is fetched, tokenized
and deleted before the next is fetched, so the disk holds one file and the tokens, five bytes each. What a killed
process had made is there for the next.
"""

import dataclasses
import datetime
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_jax import checksums
from qlora_jax.checksums import Input
from qlora_jax.data import hub
from qlora_jax.data.chat_examples import ChatCuts, ChatForms, tokenize_chats, uses_chat_template
from qlora_jax.data.detect import AUTO, format_of_file, known_format
from qlora_jax.data.examples import Example, Lengths, Truncated, tokenize_examples
from qlora_jax.data.formats import COLUMNS, FORMATS, stream_chats, stream_texts
from qlora_jax.data.glue.tasks import FORMAT as GLUE
from qlora_jax.data.glue.tasks import task_of
from qlora_jax.data.read import data_files, data_sets, data_shards, is_on_hub, stream_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.feed.cache import Entry, cached, contents, key_of, remembered
from qlora_jax.feed.labelled import write_labelled
from qlora_jax.feed.sources import Source
from qlora_jax.feed.store import ExampleStore, write_examples
from qlora_jax.text.tokenizer import Tokenizer

_TEXTS = 4096  # that are tokenized at a time
# Keys of the config's `data` section that decide nothing about a data set's examples; a key that is not here does.
_AFTERWARDS = {
    "path", "batches", "group_by_length", "pad_to_multiple_of", "packing", "pack_length", "max_examples", "eval_path",
    "eval_examples", "seed", "weights", "streaming", "max_rows",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizedSet:
    """The examples of a data set.

    Attributes:
      format: what its rows were read as. chat: whether in the model's chat template.
      rows, left_out, made: rows that were read, those of them without an answer, and texts or chats that they gave.
      cuts: what examples lost. input: what it was made from, and the checksum of its examples.
      lines: for a run's report, where and how it is kept.
    """

    source: Source
    store: ExampleStore
    format: str
    chat: bool
    rows: int
    left_out: int
    made: int
    cuts: Truncated | ChatCuts
    input: Input
    lines: list[str]


class Reading:
    """How rows become tokens under a config, its tokenizer and the model's sizes."""

    def __init__(self, config: Any, tokenizer: Tokenizer, vocab_size: int, lengths: Lengths):
        """`config`: the `data` section."""
        self.config, self.tokenizer, self.vocab_size, self.lengths = config, tokenizer, vocab_size, lengths

    def read(self, source: Source, limit: int) -> TokenizedSet:
        """The first `limit` examples (0: all) of a data set, from the cache or through it.

        Raises InputError: whatever is wrong with the data set or the settings for it.
        """
        if self.config.streaming and self._is_elsewhere(source):
            shards, lines = self._shards(source)
            entries = self._stream(source, shards, limit, lines)
        else:
            files = data_files(source.path, self.config.revision)
            hashed = contents(files)
            make = self._maker(source, limit, self.config.max_rows)
            entry = cached(self._key(hashed, source, limit, self.config.max_rows), lambda file: make(file, files))
            entries = [dataclasses.replace(entry, parts=hashed)]
            lines = [f"data: tokens {'kept' if entry.is_new else 'read from what is kept'} in {entry.folder}"]
        return self._whole(source, entries, lines)

    def _is_elsewhere(self, source: Source) -> bool:
        """Whether a set is one of the hub, which alone are streamed. Raises InputError for data.path on this disk."""
        if is_on_hub(source.path):
            return True
        if source.path in data_sets(self.config.path):
            raise InputError(
                f"data.streaming is for data sets of the hub (owner/name), and {source.path} is none: leave it off for "
                "files on this machine"
            )
        return False

    def _key(self, files: list[tuple[str, str]], source: Source, limit: int, max_rows: int) -> str:
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _AFTERWARDS}
        settings |= {"format": source.format, "limit": limit, "max_rows": max_rows}
        if source.format == AUTO:
            settings["known"] = known_format(source.path)
        if not self.lengths.are_given:
            settings["context"] = self.lengths.context
        return key_of(files, self.tokenizer.content(), settings)

    def _maker(self, source: Source, limit: int, max_rows: int) -> Callable[..., dict[str, Any]]:
        """What makes an entry of the cache from files."""

        def make(file: Path, files: list[tuple[str, Path]]) -> dict[str, Any]:
            format = source.format
            if format == GLUE:
                task = task_of(self.config.task, source.path)
                return write_labelled(file, files, task, self.tokenizer, self.lengths, limit, max_rows)
            if format == AUTO:
                format = known_format(source.path) or format_of_file(files[0][1], files[0][0])
            counted = _Counts()
            rows = counted.rows(files, COLUMNS.get(format, ()), max_rows)
            first = next(rows)
            is_conversation = FORMATS[format].is_conversation(first)
            chat = uses_chat_template(self.config.template, is_conversation, self.tokenizer)
            tokenize = self._chats(source) if chat else self._pairs()
            made = (stream_chats if chat else stream_texts)(itertools.chain([first], rows), format)
            counted.cuts = ChatCuts() if chat else Truncated()
            totals = write_examples(file, counted.examples(made, limit, tokenize))
            cuts = dataclasses.asdict(counted.cuts)
            counts = {"rows": counted.found, "left_out": counted.left_out, "made": counted.made}
            return dataclasses.asdict(totals) | counts | {"chat": chat, "format": format, "cuts": cuts}

        return make

    def _whole(self, source: Source, entries: list[Entry], lines: list[str]) -> TokenizedSet:
        """One data set of the entries of its files."""
        facts = [entry.facts for entry in entries]
        first = facts[0]
        for entry, other in zip(entries, facts, strict=True):
            if (other["format"], other["chat"]) != (first["format"], first["chat"]):
                raise InputError(
                    f"{source.path}: {entries[0].parts[0][0]} has rows of data.format={first['format']} and "
                    f"{entry.parts[0][0]} of {other['format']}; set data.format, or read them as two data sets"
                )
            if other["highest_token"] >= self.vocab_size:
                raise InputError(
                    f"{other['highest_where']}: the tokenizer gives token id {other['highest_token']}, the model has "
                    f"embeddings for {self.vocab_size} tokens: tokenizer and model do not belong together"
                )
        chat = first["chat"]
        cuts = sum((_cuts(other) for other in facts[1:]), _cuts(first))
        rows, left_out, made = (sum(each[name] for each in facts) for name in ("rows", "left_out", "made"))
        if not sum(each["examples"] for each in facts):
            if cuts.dropped:
                what = "chats has room for an answer" if chat else "examples has room for a token to learn"
                reason = f"none of its {cuts.dropped:,} {what} in {self.lengths}; make it larger"
            else:
                reason = f"none of its {rows} rows has anything to learn"
            raise InputError(f"{source.path}: {reason}")
        template = json.dumps(self.tokenizer.chat_template).encode()
        parts = [part for entry in entries for part in entry.parts]
        parts.append(("the tokenizer", checksums.of(self.tokenizer.content().replace(template, b""))))
        parts += [("the chat template", checksums.of(template))] if chat else []
        found = [each["content"] for each in facts]
        content = Input(found[0] if len(found) == 1 else checksums.of(*found), parts)
        store = ExampleStore.joined([entry.store for entry in entries])
        return TokenizedSet(source, store, first["format"], chat, rows, left_out, made, cuts, content, lines)

    def _shards(self, source: Source) -> tuple[list[hub.Shard], list[str]]:
        """The files of a hub data set, as the hub names them, or as it did when it was last reached."""
        revision = self.config.revision
        asked, is_old = remembered(
            f"{source.path} at {revision}", lambda: data_shards(source.path, revision), hub.Unreachable
        )
        said = f"data: the hub cannot be reached: the files of {source.path} are those that it named the last time"
        return [hub.Shard(*shard) for shard in asked], [said] if is_old else []

    def _stream(self, source: Source, shards: list[hub.Shard], limit: int, lines: list[str]) -> list[Entry]:
        """The entries of a hub data set's files, in order, up to data.max_rows; `lines` gets what there is to say."""
        entries: list[Entry] = []
        rows, made = 0, 0
        with tqdm(shards, desc=f"data: {source.path}", unit="file", delay=2) as bar:
            for shard in bar:
                most = self.config.max_rows and self.config.max_rows - rows
                first = limit and limit - made
                hashed = [(shard.label, shard.content)]
                make = functools.partial(_fetch, shard, self._maker(source, first, most))
                entry = cached(self._key(hashed, source, first, most), make)
                entries.append(dataclasses.replace(entry, parts=hashed))
                rows, made = rows + entry.facts["rows"], made + entry.facts["made"]
                if rows == self.config.max_rows > 0 or 0 < limit <= made:
                    break
        new = [shard for shard, entry in zip(shards, entries, strict=False) if entry.is_new]
        kept = sum(file.stat().st_size for entry in entries for file in entry.folder.iterdir())
        largest = f" (the largest has {max(shard.bytes for shard in new) / 1e6:,.1f} MB)" if new else ""
        lines.append(
            f"data: streamed {len(entries):,} of the {len(shards):,} files of {source.path}: {len(new):,} fetched now, "
            f"each deleted before the next{largest}; the tokens take {kept / 1e6:,.1f} MB in {entries[0].folder.parent}"
        )
        return entries

    def _pairs(self) -> Callable[..., tuple[list[Example], Any]]:
        if self.config.turns != "all":
            raise InputError(
                f"data.turns is {self.config.turns!r}, which is for chats in a model's chat template; here "
                f"data.template={self.config.template} takes the paper's prompts (data.template=chat takes the model's)"
            )
        return lambda texts: tokenize_examples(texts, self.tokenizer, self.lengths, self.config.train_on_source)

    def _chats(self, source: Source) -> Callable[..., tuple[list[Example], Any]]:
        config, lengths = self.config, self.lengths
        if not lengths.are_given and (lengths.max_source_len or lengths.max_target_len):
            raise InputError(
                f"data.max_source_len is {lengths.max_source_len} and data.max_target_len {lengths.max_target_len}, "
                "but the turns of a chat have room for both together: give both, or leave both at 0"
            )
        try:
            day = datetime.date.fromisoformat(config.template_date)
        except ValueError as error:
            raise InputError(f"data.template_date is {config.template_date!r}; expected a day as YYYY-MM-DD") from error
        return lambda chats: tokenize_chats(
            chats, self.tokenizer, lengths.room, config.train_on_source, day, config.turns
        )


def _fetch(shard: hub.Shard, make: Callable[..., dict[str, Any]], file: Path) -> dict[str, Any]:
    with hub.fetched(shard, file.parent) as raw:
        return make(file, [(shard.label, raw)])


def _cuts(facts: dict[str, Any]) -> Any:
    """Truncated or ChatCuts, as an entry has them."""
    cuts = facts["cuts"]
    if not facts["chat"]:
        return Truncated(**cuts)
    forms = cuts["forms"]
    return ChatCuts(**cuts | {"forms": ChatForms(**forms | {"unknown_ends": tuple(forms["unknown_ends"])})})


@dataclasses.dataclass
class _Counts:
    """The way from rows to examples, and what is counted on it."""

    cuts: Any = None  # Truncated or ChatCuts, all blocks together
    found: int = 0  # rows
    left_out: int = 0  # of them, for want of an answer
    made: int = 0  # texts or chats

    def rows(self, files: list[tuple[str, Path]], columns: Sequence[str], most: int) -> Iterator[Row]:
        """The first `most` rows (0: all)."""
        for label, file in files:
            for row in stream_rows(file, label, columns):
                self.found += 1
                yield row
                if self.found == most:
                    return

    def examples(
        self, made: Iterable[list[Any]], limit: int, tokenize: Callable[..., tuple[list[Example], Any]]
    ) -> Iterator[Example]:
        """All rows are read and checked, also those beyond the limit."""
        for some in itertools.batched(self._first(made, limit), _TEXTS):
            examples, cuts = tokenize(some)
            yield from examples
            self.cuts += cuts

    def _first(self, made: Iterable[list[Any]], limit: int) -> Iterator[Any]:
        for of_row in made:
            self.left_out += not of_row
            for one in of_row:
                self.made += 1
                if not limit or self.made <= limit:
                    yield one
