"""config.json -> sizes: both spellings, and what would be computed wrongly is refused."""

import json

import pytest

from qlora_jax.errors import InputError
from qlora_jax.io.load import expected_shapes
from qlora_jax.models.config import parse_config, read_json
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.families.encoders import DECODERS
from qlora_jax.models.t5.config import DEFAULTS as T5
from tests.conftest import REPOSITORY


@pytest.fixture
def llama3(golden) -> dict:
    return read_json(golden / "llama" / "llama3" / "config.json")


def test_old_spelling_reads_the_same(golden, llama3):
    old = read_json(golden / "llama" / "llama3" / "config_old_style.json")
    assert "rope_scaling" in old and "rope_scaling" not in llama3
    config = parse_config(old, "x")
    assert config == parse_config(llama3, "x")
    assert dict(config.rope_scaling)["rope_type"] == "llama3" and config.tied and (config.N, config.K) == (4, 1)


def test_older_linear_scaling_and_defaults(golden):
    config = parse_config(read_json(golden / "llama" / "linear_rope" / "config.json"), "x")
    assert config.rope_scaling == (("rope_type", "linear"), ("factor", 4.0))
    config = parse_config(read_json(golden / "llama" / "llama1" / "config.json"), "x")
    assert config.K == config.N and config.H * config.N == config.D and config.rope_theta == 10000.0
    assert config.rope_scaling == ()


def test_own_head_width(golden):
    config = parse_config(read_json(golden / "llama" / "head_dim" / "config.json"), "x")
    assert config.H == 12 and config.N * config.H != config.D
    assert expected_shapes(config)["model.layers.1.self_attn.o_proj.weight"] == (config.D, config.N * config.H)


def test_unknown_architecture_lists_the_known(llama3):
    with pytest.raises(InputError, match=r"f: unknown architecture RwkvForCausalLM; known: LlamaForCausalLM, Mistral"):
        parse_config(llama3 | {"architectures": ["RwkvForCausalLM"]}, "f")
    with pytest.raises(InputError, match=r"architecture MistralsForCausalLM \(which is not MistralForCausalLM"):
        parse_config(llama3 | {"architectures": ["MistralsForCausalLM"]}, "f")
    with pytest.raises(InputError, match=r"architecture LLaMAForCausalLM \(written LlamaForCausalLM\)"):
        parse_config(llama3 | {"architectures": ["LLaMAForCausalLM"]}, "f")
    with pytest.raises(InputError, match=r"architecture LlavaForConditionalGeneration \(it has an encoder, of images"):
        parse_config(llama3 | {"architectures": ["LlavaForConditionalGeneration"]}, "f")


def test_a_decoder_beside_an_encoder_is_read_from_its_part(llama3):
    mistral = {"architectures": ["Mistral3ForConditionalGeneration"]}
    text = {key: value for key, value in llama3.items() if key != "architectures"} | {"model_type": "mistral"}
    config = parse_config(mistral | {"text_config": text, "eos_token_id": [5, 6]}, "f")
    assert (config.D, config.eos_ids, config.tied) == (llama3["hidden_size"], (5, 6), True)
    assert config.key(1, "mlp.up_proj") == "model.language_model.layers.1.mlp.up_proj.weight"
    with pytest.raises(InputError, match="f: text_config is None; expected the settings of Mistral3"):
        parse_config(mistral, "f")
    with pytest.raises(InputError, match="text_config has model_type 'qwen3'; decoders of .* are mistral, ministral3"):
        parse_config(mistral | {"text_config": text | {"model_type": "qwen3"}}, "f")
    with pytest.raises(InputError, match="f: text_config: hidden_size is 0; expected a positive integer"):
        parse_config(mistral | {"text_config": text | {"hidden_size": 0}}, "f")
    with pytest.raises(InputError, match="unknown architecture .*'gpt2'"):
        parse_config({"model_type": "gpt2"}, "f")


def test_a_decoder_of_qwen_vl_is_read_with_or_without_a_part():
    """As the hub has it, one object for both, and as transformers 5 writes it."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 40, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    whole = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    flat = parse_config(whole | text | {"rope_theta": 500.0, "rope_scaling": rope}, "f")
    part = text | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope | {"rope_theta": 500.0, "type": "default"}}
    assert flat == parse_config(whole | {"text_config": part}, "f")
    assert (flat.rope_theta, flat.rope_scaling, flat.norm_eps, flat.tied) == (500.0, (), 1e-5, False)
    assert parse_config(whole | text, "f").rope_theta == 1e6
    assert parse_config(whole | {"text_config": part | {"tie_word_embeddings": True}}, "f").tied
    with pytest.raises(InputError, match="rope scaling of type 'other' is not supported"):
        parse_config(whole | text | {"rope_scaling": rope | {"type": "other"}}, "f")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; expected a positive integer"),
        ({"vocab_size": "96"}, "vocab_size is '96'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 7}, "head width 7 is odd"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; expected true or false"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; expected one of silu"),
        (
            {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}},
            "type 'spiral' is not supported; known: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' lacks factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor of 1 numbers; expected 4",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "one entry for each kind of layer"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lacks low_freq_factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"has rope_parameters \{.*\} and rope_scaling \{.*\}, which",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"which differ"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; models of this family turn all"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is inf; expected a positive number"),
        ({"rope_parameters": {"type": "linear", "factor": 0}}, "factor is 0; expected a positive number"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ],
)
def test_refused(llama3, changes, message):
    with pytest.raises(InputError, match=message):
        parse_config(llama3 | changes, "f")


def test_two_rope_settings_that_say_the_same(llama3):
    """transformers takes rope_scaling, and theta from beside it; what it would take is what rope_parameters says."""
    expected = parse_config(llama3, "f")
    parameters = dict(llama3["rope_parameters"])
    theta = parameters.pop("rope_theta")
    assert parse_config(llama3 | {"rope_scaling": parameters, "rope_theta": theta}, "f") == expected
    assert parse_config(llama3 | {"rope_scaling": llama3["rope_parameters"]}, "f") == expected
    assert parse_config(llama3 | {"rope_scaling": None}, "f") == expected
    with pytest.raises(InputError, match=r"differ: keep the one that is meant \(.* with theta 10000, and forgets"):
        parse_config(llama3 | {"rope_scaling": parameters}, "f")


def test_layers_of_qwen_see_all_where_windows_are_off():
    """As its files on the hub are: a window and the layers that would have it, and use_sliding_window false."""
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "sliding_window": 8,
        "max_window_layers": 1,
    }  # fmt: skip
    assert parse_config(raw, "f").kind.windows == ()
    assert parse_config(raw | {"use_sliding_window": True}, "f").kind.windows == (0, 8, 8, 8)
    with pytest.raises(InputError, match="layer_types has sliding_attention, but use_sliding_window"):
        parse_config(raw | {"layer_types": ["sliding_attention"] * 4}, "f")


def test_every_family_is_in_the_docs():
    text = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    known = [*FAMILIES, *DECODERS, *T5]
    assert all(f"| `{name}` |" in text for name in known)
    assert f"{len(known)} architectures" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_several_end_tokens(llama3):
    assert parse_config(llama3 | {"eos_token_id": [2, 5]}, "f").eos_ids == (2, 5)
    assert parse_config(llama3 | {"eos_token_id": None}, "f").eos_ids == ()


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is missing"), ("{", "cannot be read as JSON"), ("[]", "holds a JSON list")]
)
def test_unreadable_json(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"config.json {message}"):
        read_json(path)


def test_sizes_are_plain_values(llama3):
    hash(parse_config(json.loads(json.dumps(llama3)), "f"))  # a static field of the model: must be hashable
