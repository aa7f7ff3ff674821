"""Sizes that are known by name, against the parameters that the models' owners state."""

import importlib
import math
from pathlib import Path

import pytest

from qlora_jax.models.known import KNOWN, known_config
from qlora_jax.models.sizes import linear_weights

# billions, by the model cards and papers
PARAMETERS = {
    "huggyllama/llama-7b": 6.738,
    "huggyllama/llama-13b": 13.016,
    "huggyllama/llama-30b": 32.529,
    "huggyllama/llama-65b": 65.286,
    "TinyLlama/TinyLlama_v1.1": 1.100,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "meta-llama/Meta-Llama-3-70B": 70.554,
    "meta-llama/Llama-3.1-405B": 405.853,
    "meta-llama/Llama-3.2-3B": 3.213,
    "meta-llama/Llama-3.2-3B-Instruct": 3.213,
    "mistralai/Mistral-7B-v0.3": 7.248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7.248,
    "Qwen/Qwen3-8B": 8.191,
    "Qwen/Qwen3-14B": 14.768,
    "Qwen/Qwen3-30B-A3B": 30.532,
    "Qwen/Qwen3-235B-A22B": 235.094,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30.532,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.703,
    "allenai/OLMoE-1B-7B-0924": 6.919,
    "openai/gpt-oss-20b": 20.915,
    "openai/gpt-oss-120b": 116.829,
    "microsoft/phi-4": 14.660,
    "HuggingFaceTB/SmolLM3-3B": 3.075,
    "google/gemma-2-9b-it": 9.242,
    "FacebookAI/roberta-large": 0.3543,  # of 0.3554 with the pooler
    "google/gemma-3-4b-it": 3.880,  # of 4.300 with the encoder
    "google/gemma-3-12b-it": 11.766,  # of 12.187
    "google/gemma-3-27b-it": 27.009,  # of 27.432
    "facebook/opt-125m": 0.125,
    "facebook/opt-350m": 0.331,
    "facebook/opt-1.3b": 1.316,
    "facebook/opt-2.7b": 2.652,
    "facebook/opt-6.7b": 6.658,
    "facebook/opt-13b": 12.853,
    "bigscience/bloom-560m": 0.559,
    "bigscience/bloom-1b1": 1.065,
    "bigscience/bloom-1b7": 1.722,
    "bigscience/bloom-3b": 3.003,
    "bigscience/bloom-7b1": 7.069,
    "EleutherAI/pythia-160m": 0.162,
    "EleutherAI/pythia-410m": 0.405,
    "EleutherAI/pythia-1b": 1.012,
    "EleutherAI/pythia-1.4b": 1.415,
    "EleutherAI/pythia-2.8b": 2.775,
    "EleutherAI/pythia-6.9b": 6.857,
    "EleutherAI/pythia-12b": 11.846,
    "google-t5/t5-small": 0.0605,
    "google-t5/t5-base": 0.2229,
    "google-t5/t5-large": 0.7377,
    "google-t5/t5-3b": 2.8516,
    "google-t5/t5-11b": 11.3073,
}
for size, billions in (("small", 0.07696), ("base", 0.24758), ("large", 0.78315), ("xl", 2.84976), ("xxl", 11.13533)):
    PARAMETERS |= {f"google/{name.format(size)}": billions for name in ("t5-v1_1-{}", "t5-{}-lm-adapt", "flan-t5-{}")}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_of_the_model_card(name):
    config = known_config(name)
    outer = sum(math.prod(shape) for _, shape in config.outer.values())
    vectors = sum(config.depth(name) * math.prod(shape) for name, shape in config.vectors.items())
    assert (linear_weights(config) + outer + vectors) / 1e9 == pytest.approx(PARAMETERS[name], abs=6e-4)


def test_configs_name_models_whose_sizes_are_known():
    """So that each can be planned for without its files."""
    for file in sorted((Path(__file__).parents[2] / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        path = module.get_config().get("model", {}).get("path") if file.stem not in ("__init__", "pretrain") else ""
        assert not path or path in KNOWN or path.startswith("assets/"), file
