"""What stands before a text, as transformers has it, for every way in which files can say or not say it."""

import json

import pytest

from qlora_jax.data.examples import tokenize_example
from qlora_jax.generate.prompting import Request, bos_note, prompt_ids
from qlora_jax.text.chat_prompt import encode_chat
from qlora_jax.text.tokenizer import Tokenizer
from tests.bos_folder import write_folder

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def folder(golden, tmp_path):
    """folder(kind, processor, **files) -> a tokenizer (tests/bos_folder.py)."""
    count = iter(range(1000))

    def make(kind, processor, **files):
        path = tmp_path / str(next(count))
        path.mkdir()
        write_folder(path, golden, kind, processor, **files)
        return Tokenizer.from_folder(path)

    return make


def test_every_combination_as_in_transformers(folder, golden):
    cases = json.loads((golden / "bos.json").read_text())
    assert len(cases) > 100 and any(case["prefix"] for case in cases)
    for case in cases:
        files = {"tokenizer_config": case["settings"], "special_tokens_map": case["map"], "config": case["config"]}
        tokenizer = folder(case["kind"], case["processor"], **files)
        assert list(tokenizer.prefix) == case["prefix"], case
        assert tokenizer.encode_from_start("cat") == case["prefix"] + tokenizer.encode("cat")
        # what stands before a text is a begin token, even if no file names it
        assert tokenizer.bos_id == (case["prefix"][0] if case["prefix"] and case["bos"] is None else case["bos"]), case
        names = "".join(f"{name}={{{{ {name} }}}};" for name in ("bos_token", "eos_token", "image_token", "unk_token"))
        tokenizer.chat_template = names
        known = {name: case["named"].get(name, "") for name in ("bos_token", "eos_token", "image_token", "unk_token")}
        assert tokenizer.apply_chat_template([]) == "".join(f"{name}={text};" for name, text in known.items()), case


def test_post_processors(folder, golden, tmp_path):
    begun = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": True}
    begun["add_prefix_space"] = False
    one = folder("bytes", "bos")
    spec = json.loads((tmp_path / "0" / "tokenizer.json").read_text())
    for processor, prefix in (
        (begun, (0,)),
        ({"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, (0,)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, spec["post_processor"]]}, (0,)),
        ({"type": "Sequence", "processors": [spec["post_processor"], begun]}, (0, 0)),
    ):
        (tmp_path / "0" / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": processor}))
        assert Tokenizer.from_folder(tmp_path / "0").prefix == prefix
    assert one.prefix == (0,)


def test_chatml_without_a_begin_token_gets_none(folder):
    """config.json has an id for it, and the vocabulary an <s>: the tokenizer's files do not name it."""
    chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
    settings = {"eos_token": "<|im_end|>", "chat_template": "{{ bos_token }}" + chatml}
    tokenizer = folder("bytes", "none", tokenizer_config=settings, config={"bos_token_id": 0, "eos_token_id": 1})
    ids = encode_chat(tokenizer, [{"role": "user", "content": "hi"}], False)
    assert tokenizer.bos_id is None and tokenizer.controls[ids[0]] == "<|im_start|>"
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a") == tokenizer.encode_from_start("a")


def test_the_papers_prompts_begin_with_bos_and_say_so(folder):
    """A tokenizer that knows a begin token and puts it before no text: add_bos_token is false."""
    tokenizer = folder("bytes", "none", tokenizer_config=NAMED | {"add_bos_token": False})
    assert prompt_ids(tokenizer, "plain", Request("cat")) == tokenizer.encode("cat")
    assert prompt_ids(tokenizer, "plain", Request("")) == [tokenizer.bos_id]  # a model needs a token to go on from
    for template in ("alpaca", "guanaco"):
        assert prompt_ids(tokenizer, template, Request("cat"))[0] == tokenizer.bos_id
        assert "begin with '<s>', as the paper's do" in bos_note(tokenizer, template)
    assert tokenize_example("a", "b", tokenizer, 9, 9).tokens[0] == tokenizer.bos_id
    begun = folder("bytes", "bos", tokenizer_config=NAMED)
    assert prompt_ids(begun, "plain", Request("cat")) == begun.encode("cat", bos=True)
    assert bos_note(begun, "alpaca") is bos_note(tokenizer, "plain") is bos_note(tokenizer, "chat") is None
