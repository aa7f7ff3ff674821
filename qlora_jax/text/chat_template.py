"""Chat templates: the Jinja text that a checkpoint brings along to write a conversation as its model was trained on it.

A template is somebody else's program, so it runs in Jinja's sandbox. The environment is the one templates are written
for (transformers'): block lines leave no trace, `tojson` keeps the text's own characters,
`{% generation %} ... {% endgeneration %}` marks what the assistant says, and `raise_exception` lets a template refuse
a conversation.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, parser

from qlora_jax.errors import InputError

# Around a marked text while it is on its way through the template. No text has these noncharacters: see
# chat_guard.guard.
_BEGIN, _END = "\ufdd4", "\ufdd5"
_MARK = re.compile(f"[{_BEGIN}{_END}]")


class _GenerationTag(jinja2.ext.Extension):
    """Puts _BEGIN and _END around the body of a generation block. `used` on the environment: the template has one."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.globals["_marks_generation"] = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as text. `marks`: [begin, end) in characters of what stood in generation blocks, None for a
    template without such blocks."""

    text: str
    marks: list[tuple[int, int]] | None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


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
      messages: turns {"role", "content"}.
      add_generation_prompt: end with what stands before the assistant's next answer.
      special_tokens: bos_token, eos_token and others by name, as texts.
      where: the template's folder, for errors.
      tools: descriptions of functions that the assistant may call.
      now: the day for templates that write it; None is today.

    Raises:
      InputError: the template is broken, refuses this conversation, or tears its generation blocks apart.
    """
    day = now or datetime.datetime.now()
    try:
        compiled = _compile(template)
        text = compiled.render(
            messages=[dict(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=day.strftime,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: the chat template is broken at line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template may fail in any way that a program may
        raise InputError(f"{where}: the chat template refuses this conversation: {error}") from error
    if "_marks_generation" not in compiled.environment.globals:
        return Rendered(text, None)
    return _take_marks(text, where)


def _take_marks(text: str, where: str) -> Rendered:
    kept, marks, begin, last = "", [], None, 0
    for found in _MARK.finditer(text):
        kept += text[last : found.start()]
        last = found.end()
        if (found[0] == _BEGIN) != (begin is None):
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
