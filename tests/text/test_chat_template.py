"""Rendering of chat templates: the forms that released models use, and templates that misbehave."""

import json

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


def test_what_transformers_gives_templates():
    assert rendered("{{ [1] | tojson(true, 2, [',', ':']) }}") == "[\n  1\n]"
    assert rendered("{{ 'é\ufdd04\ufdd1' | tojson(true) }}") == '"\\u00e9\ufdd04\ufdd1"'
    assert rendered("{{ dict(a=1).a }}{% set n = namespace(self=2) %}{{ n['self'] }}") == "12"
    message = {"role": "assistant", "content": None, "thinking": "t"}
    rest = "{{ messages[0] | tojson(sort_keys=true) }}"
    expected = {"reasoning_content": "t", "role": "assistant", "thinking": "t"}
    assert json.loads(render(rest, [message], False, {}, "FOLDER").text) == expected
    message = {"role": "assistant", "content": "", "reasoning_content": "t"}
    assert "thinking" in render(rest, [message], False, {}, "FOLDER").text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation: access to attribute"),
        ("{{ messages.append(1) }}", "refuses this conversation: access to attribute"),
        ("{% set n = namespace() %}{% set n.x = 1 %}{{ namespace(_x=1) }}", "a namespace takes no name '_x'"),
        ("{% for n in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "stopped: it makes a text or a list of 10,000,000,000"),
        ("{{ [1] * 10**10 }}", "stopped: it makes a text or a list"),
        ("{{ (10**999)**999 }}", "stopped: it makes a number"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "stopped"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "stopped"),
        ("{{ ('ab' * 999999) | sort }}", "stopped: it sorts or compares 1,999,998 entries"),
        ("{% for i in range(99) %}{% set x = ('a ' * 999999).split() %}{% endfor %}",
         "stopped: it makes more than 1,073,741,824 characters"),
        ("{% set x = 1 %}" * 9999, "has 149,985 characters; expected 131,072 at most"),
        ("{{ 'a'.center(10**10) }}", "stopped"), ("{{ 'a' | center(10**10) }}", "stopped"),
        ("{{ 'a' | indent(10**10) }}", "stopped"), ("{{ [1] | tojson(indent=10**10) }}", "stopped"),
        ("{{ '%999999999d' % 1 }}", "stopped"), ("{{ '{:>999999999}'.format(1) }}", "stopped"),
        ("{{ '{:{}}'.format(1, 10**10) }}", "stopped"), ("{{ '%*d' | format(10**10, 1) }}", "stopped"),
        ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "stopped"),
        ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", "stopped"),
        ("{{ (['a' * 9999] * 9999) | join }}", "stopped"), ("{{ ''.join(['a' * 9999] * 9999) }}", "stopped"),
        ("{{ ([[1] * 9999] * 9999) | sum(start=[]) }}", "stopped"), ("{{ 'a' | batch(10**10) }}", "stopped"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "it writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself, or is nested, too deeply"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "calls itself, or is nested, too deeply"),
        ("{{ raise_exception('') }}", "refuses this conversation: TemplateError"),
    ],
)  # fmt: skip
def test_templates_are_kept_within_bounds(template, reason):
    with pytest.raises(InputError, match=reason) as error:
        rendered(template)
    assert str(error.value).startswith("FOLDER: the chat template ") and not str(error.value).endswith(":")


def test_a_template_that_takes_too_long(monkeypatch):
    monkeypatch.setattr("qlora_jax.text.chat_sandbox.SECONDS", 0.05)
    for template in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ):
        with pytest.raises(InputError, match="FOLDER: the chat template is stopped: it takes more than 0 s"):
            rendered(template)


def test_memory_that_runs_out_is_said(monkeypatch):
    def exhaust(_):
        raise MemoryError

    monkeypatch.setattr("qlora_jax.text.chat_template._compile", exhaust)
    with pytest.raises(InputError, match="FOLDER: the chat template is stopped: it uses up the memory$"):
        rendered("x")


@pytest.mark.parametrize("use", ["n.x", "n.x | tojson", "n.x | string", "n.x ~ ''", "'%s' % n.x", "[n.x] | join"])
def test_a_list_that_holds_another_many_times(monkeypatch, use):
    monkeypatch.setattr("qlora_jax.text.chat_sandbox.LONGEST", 9999)
    nested = "{% set n = namespace(x=['ab']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    with pytest.raises(InputError, match="stopped: it makes a text of more than 9,999"):
        rendered(nested + "{{ " + use + " }}")
