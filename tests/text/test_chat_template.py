"""Rendering of chat templates: the forms that released models use, and templates that misbehave."""

import pytest

from qlora_jax.errors import InputError
from qlora_jax.text.chat_template import render

TURNS = [{"role": "user", "content": "<b> & 'Grüße'"}, {"role": "assistant", "content": "ok"}]


def rendered(template, messages=TURNS, add_generation_prompt=True, **tokens):
    return render(template, messages, add_generation_prompt, tokens, "FOLDER").text


def test_block_lines_leave_no_trace():
    template = (
        "{%- for message in messages %}\n"
        "    {%- if message['role'] != 'system' %}\n"
        "<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n"
        "    {% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}\n"
        "<|im_start|>assistant\n"
        "{% endif %}\n"
    )
    assert rendered(template) == (
        "<|im_start|>user\n<b> & 'Grüße'<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not rendered(template, add_generation_prompt=False).endswith("assistant\n")


def test_tojson_keeps_characters():
    assert rendered("{{ messages[0] | tojson }}") == '{"role": "user", "content": "<b> & \'Grüße\'"}'
    assert rendered("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_tokens_tools_loops_dates_and_generation_marks():
    template = (
        "{{ bos_token }}{% if tools %}x{% endif %}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    )
    assert rendered(template, bos_token="<s>") == "<s>user"
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4


def test_errors_are_one_line_with_the_folder():
    with pytest.raises(InputError, match="FOLDER: the chat template refuses this conversation: no system turns"):
        rendered("{{ raise_exception('no system turns') }}")
    with pytest.raises(InputError, match="FOLDER: the chat template is broken at line 2"):
        rendered("\n{% for %}")
    with pytest.raises(InputError, match="refuses this conversation"):
        rendered("{{ messages[0].a.b }}")
    with pytest.raises(InputError, match="refuses this conversation"):
        rendered("{{ 1 / 0 }}")


def test_templates_run_in_a_sandbox():
    with pytest.raises(InputError, match="refuses"):
        rendered("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="refuses"):
        rendered("{{ messages.append(1) }}")
