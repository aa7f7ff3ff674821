"""Chat templates: the Jinja text that a checkpoint brings along to write a conversation as its model was trained on it.

A template is somebody else's program, so it runs in Jinja's sandbox. The environment is the one templates are written
for (transformers'): block lines leave no trace, `tojson` keeps the text's own characters, and
`raise_exception` lets a template refuse a conversation.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, parser

from qlora_jax.errors import InputError


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text in some templates; its body is kept."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    where: str,
) -> str:
    """The conversation as text.

    Args:
      template: Jinja source.
      messages: turns {"role", "content"}.
      add_generation_prompt: end with what stands before the assistant's next answer.
      special_tokens: bos_token, eos_token and others by name, as texts.
      where: the template's folder, for errors.

    Raises:
      InputError: the template is broken, or refuses this conversation.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}: the chat template is broken at line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template may fail in any way that a program may
        raise InputError(f"{where}: the chat template refuses this conversation: {error}") from error
