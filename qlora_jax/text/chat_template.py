"""Chat templates: the Jinja text that a checkpoint brings along to write a conversation as its model was trained on it.

They run in the bounded environment of `chat_sandbox`, on the variables that transformers gives them.
"""

import dataclasses
import datetime
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from qlora_jax.errors import InputError
from qlora_jax.text.chat_sandbox import BEGIN, END, LONGEST, Environment, TooMuch

# A message's reasoning by its names: the first is the one that most templates read, gpt-oss reads the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = re.compile(f"[{BEGIN}{END}]")
_SEARCHES = (
    "split", "rsplit", "partition", "rpartition", "find", "rfind", "index", "count", "replace", "startswith",
    "endswith", "removeprefix", "removesuffix",
)  # methods that look for a text  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text. `marks`: [begin, end) in characters of what stood in generation blocks, None for a
    template without such blocks."""

    text: str
    marks: list[tuple[int, int]] | None


_MOST_SOURCE = 2**17  # characters of a template, some five times what the longest has: each costs time to compile


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    with warnings.catch_warnings():  # of Python's compiler about an odd expression: they would go to stderr
        warnings.simplefilter("ignore")
        return Environment().from_string(template)


@functools.lru_cache(maxsize=8)
def searched(template: str) -> tuple[str, ...]:
    """Texts that a template looks for in others (`'x' in content`, `content.split('x')`); none of a broken one."""
    if len(template) > _MOST_SOURCE:
        return ()
    try:
        tree = Environment().parse(template)
    except (jinja2.TemplateError, RecursionError, MemoryError):
        return ()
    found = [each.expr for each in tree.find_all(nodes.Compare) if each.ops[0].op in ("in", "notin")]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            found += call.args
    return tuple(node.value for node in found if isinstance(node, nodes.Const) and isinstance(node.value, str))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    where: str,
    tools: Sequence[Any] | None = None,
    now: datetime.date | None = None,
) -> Rendered:
    """The conversation as text, and what of it the template marks as the assistant's.

    Args:
      template: Jinja source.
      messages: turns {"role", "content", ...}. As transformers does it, what is None is left out, and reasoning is
        there under the names that templates read.
      add_generation_prompt: end with what stands before the assistant's next answer.
      special_tokens: bos_token, eos_token and others by name, as texts.
      where: the template's folder, for errors.
      tools: descriptions of functions that the assistant may call.
      now: the day for templates that write it; None is today.

    Raises:
      InputError: the template is broken, refuses this conversation, tears its generation blocks apart, or goes over
        the bounds of `chat_sandbox`.
    """
    if len(template) > _MOST_SOURCE:
        raise InputError(
            f"{where}: the chat template has {len(template):,} characters; expected {_MOST_SOURCE:,} at most"
        )
    day = now or datetime.datetime.now()
    try:
        compiled = _compile(template)
        environment = compiled.environment
        assert isinstance(environment, Environment)
        environment.start()
        pieces, length = [], 0
        for piece in compiled.generate(
            messages=[_as_transformers(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=day.strftime,
            **special_tokens,
        ):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise TooMuch(f"it writes more than {LONGEST:,} characters")
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: the chat template is broken at line {error.lineno}: {error.message}") from error
    except TooMuch as error:
        raise InputError(f"{where}: the chat template is stopped: {error}") from error
    except MemoryError as error:
        raise InputError(f"{where}: the chat template is stopped: it uses up the memory") from error
    except RecursionError as error:
        raise InputError(f"{where}: the chat template is stopped: it calls itself, or is nested, too deeply") from error
    except Exception as error:  # a template may fail in any way that a program may
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the chat template refuses this conversation: {reason}") from error
    text = "".join(pieces)
    return _take_marks(text, where) if environment.marks else Rendered(text, None)


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _take_marks(text: str, where: str) -> Rendered:
    kept, marks, begin, last = "", [], None, 0
    for found in _MARK.finditer(text):
        kept += text[last : found.start()]
        last = found.end()
        if (found[0] == BEGIN) != (begin is None):
            raise InputError(f"{where}: the chat template's generation blocks are nested or torn apart")
        if begin is None:
            begin = len(kept)
            continue
        if len(kept) > begin:
            marks.append((begin, len(kept)))
        begin = None
    if begin is not None:
        raise InputError(f"{where}: the chat template's generation blocks are torn apart")
    return Rendered(kept + text[last:], marks)
