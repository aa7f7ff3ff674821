"""The table of adapter_config.json holds every key of PEFT; what it refuses it names; expressions are PEFT's."""

import dataclasses
import json
import re

import pytest

from qlora_jax.errors import InputError
from qlora_jax.io.peft_config import INERT, INITS, KEYS, READ, read_config
from tests.llama_names import LINEARS

EARLIER = {"enable_lora", "merge_weights"}  # keys of peft 0.2
L = 3
MODULES = {f"model.layers.{index}.{name}": index for index in range(L) for name in LINEARS} | {"lm_head": None}


@pytest.fixture(scope="module")
def peft(golden):
    return json.loads((golden / "peft" / "lora_config.json").read_text())


@pytest.fixture
def read(tmp_path):
    """The config of a file with these keys, and those of a plain adapter where they are not among them."""

    def read(**keys):
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | keys
        settings = {key: value for key, value in settings.items() if value is not ...}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        return read_config(tmp_path)

    return read


def placed(config):
    return set(config.placed(MODULES))


def test_every_key_of_peft_has_a_place(peft, read):
    assert KEYS.keys() == peft["keys"].keys() | EARLIER, "peft has other keys: say what each means here"
    assert {re.sub(r"\[.*\]", "N", name) for name in peft["inits"]} <= INITS.keys()
    defaults = {key: value for key, value in peft["keys"].items() if key not in ("peft_type", "target_modules")}
    assert read(**defaults) == read(r=..., lora_alpha=...)


@pytest.mark.parametrize("key", [key for key, values in KEYS.items() if isinstance(values, tuple)])
def test_what_is_not_computed_here_is_refused_by_its_key(read, key):
    plain = read()
    for value in KEYS[key]:
        assert read(**{key: value}) == dataclasses.replace(plain, has_head=value == "SEQ_CLS")
    for value in (True, 0, 1, "x", [1], {"a": 1}):
        with pytest.raises(InputError, match=f"adapter_config.json: {key}=.* is not supported; merge it in peft"):
            read(**{key: value})


def test_what_has_no_effect_has_none(read):
    plain = read()
    for key in (key for key, values in KEYS.items() if values == INERT):
        for value in (None, True, "x", {"a": [1]}):
            assert read(**{key: value}) == plain


def test_other_kinds_of_adapters(peft, read):
    for kind in [*peft["peft_types"], None, "lora"]:
        if kind != "LORA":
            with pytest.raises(InputError, match=f"peft_type is {kind!r}; expected LORA"):
                read(peft_type=kind)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base(read, value):
    assert read(init_lora_weights=value).residual == ""


@pytest.mark.parametrize(("value", "found"), [("pissa", "pissa"), ("olora", "olora"), ("OLoRA", "olora")])
def test_starts_whose_base_can_be_made_again(read, value, found):
    assert read(init_lora_weights=value).residual == found


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("pissa_niter_16", "randomized decomposition.*path_initial_model_for_weight_conversion"),
        ("corda", "along data.*path_initial_model_for_weight_conversion"),
        ("lora_ga", "along gradients.*path_initial_model_for_weight_conversion"),
        ("loftq", "quantized by LoftQ.*merge_and_unload"),
        ("pisa", 'expected one of true, false, null, "gaussian"'),
        ("PiSSA", "expected one of"),
        ("true", "expected one of"),
        (1, "expected one of"),
        ({"pissa": 1}, "expected one of"),
    ],
)
def test_starts_that_cannot_be_read(read, value, reason):
    with pytest.raises(InputError, match=f"init_lora_weights is .*{reason}"):
        read(init_lora_weights=value)


def test_unknown_keys(read):
    with pytest.raises(InputError, match="unknown key 'lora_alhpa' with the value 16 .*known one is lora_alpha"):
        read(lora_alhpa=16)
    with pytest.raises(InputError, match=r"unknown key 'frobnicate' with the value \{'a': 1\} \(peft 0.21 has none"):
        read(frobnicate={"a": 1})
    for value in (0, "", "none", True):
        with pytest.raises(InputError, match="unknown key 'use_next'"):
            read(use_next=value)
    for value in (None, False, [], {}):  # as a newer peft writes what is not asked for
        assert read(use_next=value) == read()


def test_the_defaults_of_peft(read):
    config = read(r=..., lora_alpha=..., target_modules=...)
    assert (config.rank, config.alpha, config.targets) == (8, 8.0, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"r": "4"}, "r is '4'; expected whole numbers from 1"),
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None; expected positive numbers"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; expected a probability"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"use_rslora": "true"}, "use_rslora is 'true'; expected true or false"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]; expected an object"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern is {'q_proj': '8'}; expected whole numbers"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is {'q_proj': nan}; expected positive"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}; expected a list of names"),
        ({"target_modules": ["q_proj", 1]}, r"target_modules is \['q_proj', 1\]"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; expected a list of names"),
        ({"modules_to_save": ["lm_head", "score"]}, "modules_to_save has 'score'; readable are embed_tokens"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\]; expected indices"),
        ({"layers_to_transform": True}, "layers_to_transform is True"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "layers_pattern is 'h'; expected null or 'layers'"),
        ({"layers_to_transform": 0, "target_modules": "all-linear"}, "layers_to_transform is 0; expected null"),
    ],
)
def test_values_of_another_kind(read, keys, message):
    with pytest.raises(InputError, match=f"adapter_config.json: {message}"):
        read(**keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, r".*\.(q|v)_proj"),
        ({"target_modules": ["mlp.up_proj", "lm_head", "query_key_value"]}, r".*up_proj|lm_head"),
        ({"target_modules": ["lm_head", "o_proj"], "modules_to_save": ["model.embed_tokens", "lm_head"]}, r".*o_proj"),
        ({"target_modules": "all-linear"}, r"model.*"),
        ({"target_modules": "All-Linear", "exclude_modules": ["mlp.up_proj", "k_proj"]}, r"model.*\.(?!up|k_)\w+"),
        ({"target_modules": r".*\.(q|k)_proj"}, r".*\.(q|k)_proj"),
        ({"target_modules": "q_proj"}, r"^$"),  # an expression over the whole name
        ({"target_modules": r"model\.layers\.[01]\..*|lm_head"}, r"model\.layers\.[01].*|lm_head"),
        ({"target_modules": r"(?i).*\bQ_proj", "exclude_modules": r".*\.1\..*"}, r"model\.layers\.[02].*q_proj"),
        ({"layers_to_transform": [0, 2, 9]}, r"model\.layers\.[02].*\.(q|v)_proj"),
        ({"layers_to_transform": 1, "layers_pattern": ["layers"]}, r"model\.layers\.1.*\.(q|v)_proj"),
        ({"layers_to_transform": []}, r".*\.(q|v)_proj"),
        (
            {"layers_to_transform": [1], "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"]},
            r"model\.layers\.(0.mlp.up|1.self_attn.q)_proj",
        ),
    ],
)
def test_modules_that_carry_an_adapter(read, keys, expected):
    assert placed(read(**keys)) == {name for name in MODULES if re.fullmatch(expected, name)}


def test_the_first_pattern_that_matches_counts(read):
    config = read(
        rank_pattern={r"layers\.1\..*": 2, "q_proj": 3, "model.layers.1.self_attn.q_proj": 7, "proj": 9, "_proj": 5},
        alpha_pattern={"self_attn.v_proj": 5, "nothing": 1},
    )
    sizes = config.placed(MODULES)
    assert sizes["model.layers.0.self_attn.q_proj"] == (3, 8) and sizes["model.layers.1.self_attn.q_proj"] == (2, 8)
    assert sizes["model.layers.0.self_attn.v_proj"] == (4, 5) and sizes["model.layers.1.self_attn.v_proj"] == (2, 5)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("expression", ["(", "a)|(b", r"(?!x).*", r"(.)\1", "[", "*", "a{100000}"])
def test_expressions_that_cannot_be_matched(read, key, expression):
    if key == "rank_pattern" and expression == "a)|(b":
        return  # PEFT puts it into parentheses, where it is one
    config = read(**{key: {expression: 1} if key == "rank_pattern" else expression})
    with pytest.raises(InputError, match=f"{key} has an expression that cannot be matched .* or as names of modules"):
        config.placed(MODULES)


def test_what_is_no_text_is_no_expression(read):
    with pytest.raises(InputError, match="half a surrogate pair"):
        read(target_modules="\ud800")


def test_expressions_made_to_take_forever(read):
    """Each would keep a backtracking engine busy for longer than anybody lives."""
    for expression in (r"(([a-z_.0-9]+)+)+X", r"(.*.*.*.*)*(.*)*X", "(" * 500 + ".*" + ")*" * 500 + "X"):
        assert placed(read(target_modules=expression)) == set()
        assert read(rank_pattern={expression: 2}).placed(MODULES)["model.layers.0.self_attn.q_proj"] == (4, 8)


def test_files_made_to_take_forever(read, tmp_path):
    with pytest.raises(InputError, match="bytes; expected 1,000,000 at most"):
        read(rank_pattern={f"q_proj{index}": 8 for index in range(100_000)})
    (tmp_path / "adapter_config.json").write_text('{"a":' * 200_000)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_config(tmp_path)
    assert read(rank_pattern={f"q_proj{index}": 8 for index in range(500)}).placed(MODULES)


@pytest.mark.parametrize("key", [key for key, values in KEYS.items() if values == READ])
def test_a_key_that_is_read_is_looked_at(read, key):
    with pytest.raises(InputError, match=f"adapter_config.json: {key} is {{'x': 'y'}}; expected "):
        read(**{key: {"x": "y"}})
