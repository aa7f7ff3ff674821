"""What a run takes where nothing was said: by the rows, the model's template, and the number of examples."""

import json

import pytest

from qlora_jax.api.recipe import LEAST_STEPS, fill, fill_for_plan
from qlora_jax.base import get_config
from qlora_jax.errors import InputError
from qlora_jax.feed.load import load_data
from qlora_jax.generate.trained import template_of
from qlora_jax.models.known import known_config
from qlora_jax.text.tokenizer import Tokenizer
from tests.byte_tokenizer import TEMPLATE, write_byte_tokenizer
from tests.tiny_checkpoint import write_tiny_checkpoint

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
ALPACA = {"instruction": "Say hi.", "input": "", "output": "Hi!"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder whose tokenizer has a chat template; no weights are read here."""
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_checkpoint(folder / "model", context=1024)
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    write_byte_tokenizer(folder / "model")
    settings = folder / "model" / "tokenizer_config.json"
    ended = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] }}</s>")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": ended}))
    return folder / "model"


def filled(model, tmp_path, rows, **keys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, said = get_config(), []
    config.model.path, config.data.path = str(model), str(tmp_path / "rows.jsonl")
    given = {name.replace("__", "."): value for name, value in keys.items()}
    config.update_from_flattened_dict(given)
    fill(config, set(given), said.append)
    return config, said


@pytest.mark.parametrize(
    ("row", "format", "template"),
    [
        (CHAT, "messages", "chat"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "sharegpt", "chat"),
        (ALPACA, "alpaca", "alpaca"),
        ({"instruction": "Say.", "context": "Hi", "response": "Ho"}, "dolly", "alpaca"),
        ({"input": "Hi", "output": "Ho"}, "input-output", "plain"),
    ],
)
def test_the_format_and_how_it_is_asked_follow_from_the_rows(model, tmp_path, row, format, template):
    config, said = filled(model, tmp_path, [row] * 3)
    assert config.data.format == format and f"is read as {format}" in said[0]
    loaded = load_data(config.data, Tokenizer.from_folder(model), 1, 400, 1024)
    assert template_of(loaded.sources) == template


def test_few_rows_are_all_trained_on(model, tmp_path):
    config, said = filled(model, tmp_path, [ALPACA] * 3)
    assert config.data.eval_examples == 0 and config.data.packing
    assert config.train.steps == LEAST_STEPS
    assert (config.train.grad_accum, config.model.remat) == ("auto", "auto")
    assert said[-1].startswith("recipe: 3 examples, 0 held out")


def test_many_rows_hold_some_out_and_pass_three_times(model, tmp_path):
    rows = [ALPACA | {"output": str(number)} for number in range(400)]
    config, _ = filled(model, tmp_path, rows)
    assert config.data.eval_examples == 20
    assert LEAST_STEPS <= config.train.steps <= 3 * 400 / 16 + 3 * 10
    copies, _ = filled(model, tmp_path, [ALPACA] * 400)
    assert copies.data.eval_examples == 0


def test_what_was_said_stays(model, tmp_path):
    keys = {"train__steps": 7, "train__batch_size": 6, "data__packing": False, "data__eval_examples": 1}
    keys |= {"data__format": "alpaca", "model__compute_dtype": "bfloat16"}
    rows = [ALPACA | {"output": str(number)} for number in range(40)]
    config, _ = filled(model, tmp_path, rows, **keys)
    assert (config.train.steps, config.train.batch_size, config.data.eval_examples) == (7, 6, 1)
    assert not config.data.packing and config.model.compute_dtype == "bfloat16"
    config, _ = filled(model, tmp_path, rows, train__grad_accum=3)
    assert config.train.grad_accum == 3 and config.train.batch_size % 3 == 0


def test_the_same_is_chosen_again(model, tmp_path):
    first, second = (filled(model, tmp_path, [CHAT] * 50)[0] for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_mistakes_show_before_anything_is_chosen(model, tmp_path):
    with pytest.raises(InputError, match=r"train.batch_size is 0"):
        filled(model, tmp_path, [ALPACA], train__batch_size=0)
    with pytest.raises(InputError, match="optimizer.learning_rate"):
        filled(model, tmp_path, [ALPACA], optimizer__learning_rate=-1.0)


def test_large_models_learn_slower():
    large, small = known_config("huggyllama/llama-65b"), known_config("huggyllama/llama-7b")
    assert large is not None and small is not None
    for sizes, rate in ((large, 1e-4), (small, 2e-4)):
        config, said = get_config(), []
        fill_for_plan(config, sizes, set(), said.append)
        assert config.optimizer.learning_rate == rate
        assert config.data.packing and config.data.pack_length == 1024 and "1,024 tokens" in said[0]
    fill_for_plan(config := get_config(), small, {"data.max_source_len"}, said.append)
    assert not config.data.packing
