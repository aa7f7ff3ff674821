"""Rows of conversations. As the paper trains OASST1 and HH-RLHF, the whole conversation is the target, the turns of
the human included, up to the last answer; a row without an answer gives no example. A system turn is the source.
For chat templates `forms/chats` takes the same turns.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from qlora_jax.data.fields import Pair, bad, kind, text
from qlora_jax.data.forms.turns import Turn, is_learned, plain_turns
from qlora_jax.data.prompts import GUANACO_LABELS, HH_LABELS, guanaco_conversation
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_GUANACO_TURN = re.compile("(" + "|".join(re.escape(label) for label in GUANACO_LABELS.values()) + ")")
_HH_TURN = re.compile("(" + "|".join(re.escape(label) for label in HH_LABELS.values()) + ")")


def oasst1(row: Row) -> list[Pair]:
    """A conversation tree {prompt: {text, role, rank?, replies}}, its root alone {text, role, rank?, replies}, or its
    flattened form {text: "### Human: ..."}. Single messages become trees by `gather_messages` first.

    Of a tree the best-ranked path is taken: at every level the reply of the lowest rank, or the first of the file
    where none has a rank.
    """
    return guanaco(oasst1_turns(row))


def oasst1_turns(row: Row) -> list[Turn]:
    """The turns that `oasst1` trains on."""
    if "prompt" in row.fields:
        return _best_path(row, row.fields["prompt"])
    if "replies" in row.fields:
        return _best_path(row, row.fields)
    if "text" in row.fields:
        return _flattened_turns(row)
    bad(row, "prompt", 'no field "prompt" (a tree) or "text" (a flattened conversation)')


def hh_rlhf(row: Row) -> list[Pair]:
    """{chosen, rejected}, each "\\n\\nHuman: ...\\n\\nAssistant: ...": the chosen conversation, letter by letter to the
    end of its last answer that is not blank."""
    before, parts = _hh_parts(row)
    while parts and (parts[-2] != HH_LABELS["assistant"] or not parts[-1].strip()):
        del parts[-2:]
    return [Pair("", before + "".join(parts))] if parts else []


def hh_rlhf_turns(row: Row) -> list[Turn]:
    """The turns of the chosen conversation, without the blanks around them."""
    _, parts = _hh_parts(row)
    roles = {label: role for role, label in HH_LABELS.items()}
    return [
        {"role": roles[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _hh_parts(row: Row) -> tuple[str, list[str]]:
    """What stands before the first turn, then labels and texts by turns."""
    chosen = text(row, "chosen")
    before, *parts = _HH_TURN.split(chosen)
    if not parts or before.strip():
        bad(row, "chosen", f'expected text that begins with "\\n\\nHuman:", found {chosen.strip()[:40]!r}')
    return before, parts


def messages(row: Row) -> list[Pair]:
    """OpenAI's form: {messages: [{role, content}]}, in Guanaco's conversation form. Content is text, or a list of text
    parts {type: "text", text}; names and content may be ShareGPT's (forms/turns)."""
    return guanaco(one_system(row, "messages", plain_turns(row, "messages")))


def sharegpt(row: Row) -> list[Pair]:
    """ShareGPT's form: {conversations: [{from, value}]}, in Guanaco's conversation form; or OpenAI's names there."""
    return guanaco(one_system(row, "conversations", plain_turns(row, "conversations")))


def gather_messages(rows: Sequence[Row]) -> list[Row]:
    """Trees of single messages {message_id, parent_id, text, role, rank?}, each at the place of its first message.

    A data set without single messages is left as it is. A message's id stands in message_id or user_message_id, its
    parent's in parent_id or parent_message_id (null for the first of a tree).

    Raises:
      InputError: an id that is missing, not text or there twice, a parent that is not in the data set, or messages that
        answer each other in a circle.
    """
    if not rows or not any(is_single_message(row) for row in rows):
        return list(rows)
    problems = Problems()
    nodes: dict[str, dict[str, Any]] = {}
    parents: list[tuple[Row, str, Any]] = []
    for row in rows:
        try:
            name = "message_id" if "message_id" in row.fields else "user_message_id"
            identity = text(row, name)
            role_of(row, "role", _OASST_ROLES)
            text(row, "text", blank=True)
            if identity in nodes:
                bad(row, name, f"a second message with the {name} {identity!r}")
            nodes[identity] = {**row.fields, "replies": []}
            parent = row.fields.get("parent_id", row.fields.get("parent_message_id"))
            parents.append((row, identity, parent))
        except InputError as error:
            problems.add(str(error))
    problems.raise_if_any()
    trees: list[Row] = []
    for row, identity, parent in parents:
        if parent is None:
            trees.append(dataclasses.replace(row, fields=nodes[identity]))
        elif parent in nodes:
            nodes[parent]["replies"].append(nodes[identity])
        else:
            problems.add(f"{row.where}: its parent {parent!r} is not in this data set")
    problems.raise_if_any()
    reached: set[str] = set()
    below = [tree.fields for tree in trees]
    while below:
        node = below.pop()
        reached.add(node.get("message_id") or node["user_message_id"])
        below.extend(node["replies"])
    for row, identity, _ in parents:
        if identity not in reached:
            raise InputError(f"{row.where}: the message {identity!r} answers itself, by way of its parents")
    return trees


def is_single_message(row: Row) -> bool:
    """Whether a row is one message of a tree, which names its parent."""
    return "replies" not in row.fields and not {"parent_id", "parent_message_id"}.isdisjoint(row.fields)


def guanaco(turns: list[Turn]) -> list[Pair]:
    """The conversation up to its last answer that is learned and not blank; a system turn at its head is the source.

    A turn that is not to be learned is given, with its label, up to the next turn's label.
    """
    source = ""
    if turns and turns[0]["role"] == "system":
        source, turns = f"{turns[0]['content'].strip()}\n", turns[1:]
    while turns and not (turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() and is_learned(turns[-1])):
        turns = turns[:-1]
    begins = [0, *itertools.accumulate(len(guanaco_conversation([turn])) + len("\n") for turn in turns)]
    given = tuple(span for turn, span in zip(turns, itertools.pairwise(begins), strict=True) if not is_learned(turn))
    return [Pair(source, guanaco_conversation(turns), given=given)] if turns else []


def one_system(row: Row, field: str, turns: list[Turn]) -> list[Turn]:
    """The turns. Raises InputError where a system turn is not the first of them."""
    if any(turn["role"] == "system" for turn in turns[1:]):
        bad(row, field, f"a system turn that is not the first in {field}: there is no form for it")
    return turns


def role_of(message: Row, field: str, roles: dict[str, str]) -> str:
    """The role in `field` by the names of `roles`. Raises InputError for another."""
    found = text(message, field)
    if found not in roles:
        known = list(roles)
        expected = f"{', '.join(known[:-1])} or {known[-1]}"
        bad(message, field, f"expected {expected} in the field {field}, found {found!r}")
    return roles[found]


def _best_path(row: Row, node: Any) -> list[Turn]:
    turns = []
    while node is not None:
        if not isinstance(node, dict):
            bad(row, "prompt", f"expected messages as objects in the tree, found {kind(node)}")
        message = dataclasses.replace(row, fields=node)
        role = role_of(message, "role", _OASST_ROLES)
        turns.append({"role": role, "content": text(message, "text", blank=True)})
        node = _best_reply(message)
    return turns


def _best_reply(message: Row) -> Any:
    replies = message.fields.get("replies") or []
    if not isinstance(replies, list):
        bad(message, "replies", f"expected a list in the field replies, found {kind(replies)}")
    kept = [reply for reply in replies if not (isinstance(reply, dict) and reply.get("deleted"))]

    def rank(reply: Any) -> float:
        value = reply.get("rank") if isinstance(reply, dict) else None
        if value is None:
            return float("inf")
        if isinstance(value, bool) or not isinstance(value, int | float):
            bad(message, "rank", f"expected a number in the field rank, found {kind(value)}")
        return float(value)

    return min(kept, key=rank, default=None)  # min keeps the first of equals


def _flattened_turns(row: Row) -> list[Turn]:
    before, *parts = _GUANACO_TURN.split(text(row, "text"))
    if not parts or before.strip():
        bad(row, "text", f'expected text that begins with "### Human:", found {before.strip()[:40]!r}')
    roles = {label: role for role, label in GUANACO_LABELS.items()}
    return [
        {"role": roles[label], "content": content.strip()}
        for label, content in zip(parts[::2], parts[1::2], strict=True)
    ]
