"""Rows as conversations for a chat template: every format, each turn as the row has it and nothing around it.

A set of instructions gives a user's turn and an answer. Of a conversation the turns after the last answer are left out;
without an answer there is no chat. Tools' results are turns of their own, calls of tools belong to the
assistant's turn.
"""

import json
from collections.abc import Callable
from typing import Any

from qlora_jax.data.conversations import (
    OPENAI_ROLES,
    SHAREGPT_ROLES,
    Turn,
    content_of,
    hh_rlhf_turns,
    oasst1_turns,
    role_of,
)
from qlora_jax.data.fields import Pair, bad, kind, objects, text
from qlora_jax.data.rows import Row
from qlora_jax.text.chat import Chat

_OPENAI = OPENAI_ROLES | {"tool": "tool"}
_SHAREGPT = SHAREGPT_ROLES | {"tool": "tool", "observation": "tool"}
_TEXTS = ("name", "tool_call_id", "reasoning_content")  # more fields of a message that templates know


def from_pairs(read: Callable[[Row], list[Pair]]) -> Callable[[Row], list[Chat]]:
    """The reader of a set of instructions, as one that gives chats of a question and an answer."""

    def chats(row: Row) -> list[Chat]:
        found = []
        for pair in read(row):
            question = pair.source if pair.message is None else pair.message
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": pair.target}]
            found.append(Chat(turns, None, row.where))
        return found

    return chats


def from_turns(read: Callable[[Row], list[Turn]]) -> Callable[[Row], list[Chat]]:
    """The reader of a conversation's turns, as one that gives its chat."""
    return lambda row: _chat(row, [dict(turn) for turn in read(row)])


oasst1 = from_turns(oasst1_turns)
hh_rlhf = from_turns(hh_rlhf_turns)


def messages(row: Row) -> list[Chat]:
    """OpenAI's form: {messages: [{role, content, tool_calls?, ...}], tools?}. Arguments of calls are objects in
    templates, so text that is JSON becomes one; so does a list of tools that is text.

    Raises:
      InputError: a role other than system, developer, user, assistant and tool, or content that is not text.
    """
    turns = []
    for message in objects(row, "messages"):
        turn: dict[str, Any] = {"role": role_of(message, "role", _OPENAI)}
        calls = message.fields.get("tool_calls")
        silent = calls and message.fields.get("content") is None
        turn["content"] = "" if silent else content_of(message)
        for name in _TEXTS:
            if message.fields.get(name) is not None:
                turn[name] = text(message, name, blank=True)
        if calls:
            turn["tool_calls"] = _calls(message)
        turns.append(turn)
    return _chat(row, turns)


def sharegpt(row: Row) -> list[Chat]:
    """ShareGPT's form: {conversations: [{from, value}], tools?}.

    Raises:
      InputError: a speaker other than system, human (user), gpt (chatgpt, assistant) and tool (observation).
    """
    return _chat(
        row,
        [
            {"role": role_of(message, "from", _SHAREGPT), "content": text(message, "value", blank=True)}
            for message in objects(row, "conversations")
        ],
    )


def _chat(row: Row, turns: list[dict[str, Any]]) -> list[Chat]:
    while turns and not _answers(turns[-1]):
        turns = turns[:-1]
    return [Chat(turns, _tools(row), row.where)] if turns else []


def _answers(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _calls(message: Row) -> list[dict[str, Any]]:
    calls = []
    for call in objects(message, "tool_calls"):
        fields = {name: value for name, value in call.fields.items() if value is not None}
        function = fields.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            fields["function"] = function | {"arguments": _json(message, "tool_calls", function["arguments"])}
        calls.append(fields)
    return calls


def _tools(row: Row) -> list[Any] | None:
    tools = row.fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(row, "tools", tools)
    if tools and not isinstance(tools, list):
        bad(row, "tools", f"expected a list in the field tools, found {kind(tools)}")
    return tools or None


def _json(row: Row, field: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        bad(row, field, f"expected JSON in the field {field}, found {value[:40]!r}: {error}")
