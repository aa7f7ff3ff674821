"""The turns of a chat as rows have them: OpenAI's {role, content} and ShareGPT's {from, value}, in a list or JSON text.

A turn may say whether it is learned: `weight` (OpenAI, Mistral, Axolotl), `train` or `training` (Axolotl), `loss`
(ms-swift), each 0 or 1, false or true. Of the parts of an answer that are no text, calls of tools are read in OpenAI's
present form (`tool_calls`), in its former one (`function_call`, answered by the role "function") and in LLaMA-Factory's
(a turn from "function_call" whose text is JSON, answered by "observation").
"""

import json
from typing import Any

from qlora_jax.data.fields import bad, is_empty, items, kind, objects, parsed, text
from qlora_jax.data.forms.columns import MARKS, SYSTEM, TOOLS, refuse_unread
from qlora_jax.data.rows import Row

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_TOOL_ROLES = {"tool": "tool", "observation": "tool", "function": "tool", "function_call": "assistant"}

Turn = dict[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content"}; "learn": true or false where the
# row asks for it; "tool_calls", "tool_call_id", "name", "reasoning_content" as chat templates know them

_TURN_READS = ("role", "from", "content", "value", *MARKS)
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_CALLS = ("tool_calls", "function_call")
_CHAT_READS = (*_CALLS, *_THOUGHTS)
_TEXTS = {"name": "name", "tool_call_id": "tool_call_id"} | dict.fromkeys(_THOUGHTS, "reasoning_content")
_CHAT = "set data.template=chat, which has one"
_NO_TOOLS = (
    "tools are written by chat templates alone. Set data.template=chat with a model whose tokenizer has a template, as "
    "instruct models do, or take the conversations with tools out"
)


def plain_turns(row: Row, field: str, with_system: bool = True) -> list[Turn]:
    """The turns of a conversation for the paper's form: text alone, a system turn at most at its head.

    with_system: the system message of a field of the row is the first turn.

    Raises:
      InputError: a role or a part of a turn that the form has no place for, or content that is not text.
    """
    turns = []
    for message in objects(row, field):
        if given := [name for name in _CALLS if not is_empty(message.fields.get(name))]:
            bad(message, given[0], f"the paper's form has no place for {given[0]}: {_NO_TOOLS}")
        refuse_unread(message, _TURN_READS, "the paper's form of a conversation", _CHAT_READS, _CHAT)
        role = _role(message, field, with_tools=False)
        turn = _marked(message, {"role": role, "content": _content(message, field)})
        if role == "system" and turn.get("learn"):
            bad(message, _mark(message), "a system turn is marked to be learned, but it is given; take the mark out")
        turns.append(turn)
    return _with_system(row, field, turns) if with_system else turns


def chat_turns(row: Row, field: str, with_system: bool = True) -> list[Turn]:
    """The turns of a conversation for a chat template, with all that these know; `with_system` as of `plain_turns`.

    Raises:
      InputError: an unknown role, content that is not text, calls that are not JSON, or a part that is not read.
    """
    turns = []
    for message in objects(row, field):
        refuse_unread(message, (*_TURN_READS, *_CHAT_READS), "a chat")
        turn: Turn = {"role": _role(message, field, with_tools=True)}
        calls = _calls(message, field)
        is_silent = calls and is_empty(message.fields.get(_name(message, field, _CONTENT)))
        turn["content"] = "" if is_silent or _is_call(message, field) else _content(message, field)
        for name, known in _TEXTS.items():
            if message.fields.get(name) is not None:
                said = text(message, name, blank=True)
                if turn.setdefault(known, said) != said:
                    bad(message, name, f"the field {name} and another of {', '.join(_THOUGHTS)} say different things")
        if calls:
            turn["tool_calls"] = calls
        turn = _marked(message, turn)
        if turn["role"] != "assistant" and turn.get("learn"):
            bad(
                message,
                _mark(message),
                f"a turn of the role {turn['role']} is marked to be learned ({_mark(message)}), but in a chat template "
                "answers alone are; take the mark out, or learn all turns with data.template=paper",
            )
        turns.append(turn)
    return _with_system(row, field, turns) if with_system else turns


def chat_tools(row: Row) -> list[Any] | None:
    """The tools of a row: `tools`, or `functions` in OpenAI's former form; lists, or JSON text of one."""
    given = [name for name in TOOLS if not is_empty(row.fields.get(name))]
    if len(given) > 1:
        bad(row, given[1], "both tools and functions are given: which the assistant has is not known; leave one out")
    if not given:
        return None
    tools = items(row, given[0])
    if not tools:
        return None
    _check_unicode(row, given[0], tools)
    return [{"type": "function", "function": tool} for tool in tools] if given == ["functions"] else tools


def system_turn(row: Row) -> list[Turn]:
    """The system message that stands in a field of the row, as a turn; none where there is none."""
    said = {name: text(row, name) for name in SYSTEM if not is_empty(row.fields.get(name))}
    if len({value.strip() for value in said.values()}) > 1:
        names = list(said)
        bad(row, names[1], f"the fields {names[0]} and {names[1]} say different things; leave one out")
    return [{"role": "system", "content": value} for value in list(said.values())[:1]]


def is_learned(turn: Turn) -> bool:
    """Whether a turn is learned where turns of its role are."""
    return bool(turn.get("learn", True))


_ROLE, _CONTENT = ("role", "from"), ("content", "value")  # OpenAI's names and ShareGPT's


def _name(message: Row, field: str, names: tuple[str, str]) -> str:
    """The one of two names that the turn has; that of `field`'s form where it has neither."""
    preferred = names[::-1] if field == "conversations" else names
    both = [name for name in preferred if name in message.fields]
    said = [name for name in both if message.fields[name] is not None]
    if len(said) == 2 and message.fields[said[0]] != message.fields[said[1]] and names == _CONTENT:
        bad(message, said[1], f"a turn has both {said[0]} and {said[1]}, and they differ; leave one out")
    return (said or both or list(preferred))[0]


def _role(message: Row, field: str, with_tools: bool) -> str:
    name = _name(message, field, _ROLE)
    found = text(message, name)
    if len({ROLES.get(role, role) for key in _ROLE if isinstance(role := message.fields.get(key), str)}) > 1:
        bad(message, name, f"a turn has both {' and '.join(_ROLE)}, and they differ; leave one out")
    if found in ROLES:
        return ROLES[found]
    if found in _TOOL_ROLES and with_tools:
        return _TOOL_ROLES[found]
    if found in _TOOL_ROLES:
        bad(message, name, f"the paper's form has no place for a turn of the role {found}: {_NO_TOOLS}")
    known = [*ROLES, *(_TOOL_ROLES if with_tools else ())]
    bad(message, name, f"expected {', '.join(known[:-1])} or {known[-1]} in the field {name}, found {found!r}")


def _content(message: Row, field: str) -> str:
    """The text of a turn; parts of a list are joined."""
    name = _name(message, field, _CONTENT)
    if not isinstance(message.fields.get(name), list):
        return text(message, name, blank=True)
    parts = objects(message, name)
    for number, part in enumerate(parts, 1):
        if (found := part.fields.get("type")) != "text":
            place = f"part {number} of {len(parts)} in the field {name}"
            bad(message, name, f'{place}: expected content parts of type "text", found {found!r}')
    return "".join(text(part, "text", blank=True) for part in parts)


def _marked(message: Row, turn: Turn) -> Turn:
    """The turn with what the row says on whether it is learned."""
    said = {name: message.fields[name] for name in MARKS if not is_empty(message.fields.get(name))}
    for name, value in said.items():
        if isinstance(value, bool | int | float) and value in (0, 1):
            continue
        found = repr(value) if isinstance(value, int | float) else kind(value)
        bad(
            message,
            name,
            f"expected 0 or 1, false or true, in the field {name} of a turn (whether it is learned), found {found}: "
            "a turn is learned whole or not at all",
        )
    marks = {bool(value) for value in said.values()}
    if len(marks) > 1:
        bad(message, next(iter(said)), f"{' and '.join(said)} of a turn contradict each other on whether it is learned")
    asked = marks and (said.keys() != {"weight"} or marks == {False})  # a weight of 1 is what a turn without one has
    return turn | {"learn": marks.pop()} if asked else turn


def _mark(message: Row) -> str:
    return next(name for name in MARKS if not is_empty(message.fields.get(name)))


def _with_system(row: Row, field: str, turns: list[Turn]) -> list[Turn]:
    system = system_turn(row)
    if not system or not turns or turns[0]["role"] != "system":
        return system + turns if turns else []
    if turns[0]["content"].strip() != system[0]["content"].strip():
        name = next(name for name in SYSTEM if not is_empty(row.fields.get(name)))
        bad(row, name, f"the field {name} and the system turn in {field} say different things; leave one out")
    return turns


def _is_call(message: Row, field: str) -> bool:
    return message.fields.get(_name(message, field, _ROLE)) == "function_call"


def _calls(message: Row, field: str) -> list[dict[str, Any]]:
    """The calls of tools of a turn, in whichever form: {"function": {"name", "arguments"}, ...}, the arguments an
    object where they are JSON text, as templates want them."""
    given = [name for name in _CALLS if not is_empty(message.fields.get(name))]
    name = given[0] if given else _name(message, field, _CONTENT)
    if len(given) > 1:
        bad(message, given[1], "both tool_calls and function_call are given; leave one out")
    if given == ["tool_calls"]:
        calls = [call.fields for call in objects(message, name)]
        found = [{key: value for key, value in call.items() if value is not None} for call in calls]
    elif given or _is_call(message, field):
        call = message.fields[name] if given else text(message, name)
        call = parsed(message, name, call) if isinstance(call, str) else call
        found = [{"type": "function", "function": each} for each in (call if isinstance(call, list) else [call])]
    else:
        return []
    for call in found:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            bad(message, name, f"expected calls with the name of a function in {name}, found {json.dumps(call)[:40]}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            call["function"] = function | {"arguments": parsed(message, name, arguments.strip() or "{}")}
    _check_unicode(message, name, found)
    return found


def _check_unicode(row: Row, field: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        bad(row, field, f"half a surrogate pair in the field {field}: not valid Unicode")
