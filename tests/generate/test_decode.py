"""Decoding with the cache equals the full forward pass, alone and in any batch; ends, limits and seeds are kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.generate import decode
from qlora_jax.generate.decode import Decoding, complete, complete_batches, generate, room_for
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.seeds import Draws, draws_of_all
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.peft import load_adapter

pytestmark = pytest.mark.quick_compile

# Lengths are such that tests share programs: rows of the tiny model are 1, 3, 8 or 16, its caches have room for 64, 128
# or 320 tokens.
MODELS = ["llama1", "llama3"]  # a key head for each query head, and one for all
greedy = partial(generate, temperature=0.0)


def prompts_of(lengths: list[int], V: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, V, length).tolist() for length in lengths]


@partial(jax.jit, static_argnums=0)
def greedy_everywhere(graph, state, tokens):
    model = nnx.merge(graph, state)
    return jnp.argmax(model.logits(model(tokens)[0]), axis=-1)


def is_greedy(model, prompt: list[int], answer: list[int]) -> bool:
    """Whether one forward pass over prompt and answer, without a cache, prefers each token of the answer."""
    tokens = np.zeros((1, model.config.context), np.int32)
    text = prompt + answer
    tokens[0, : len(text)] = text
    preferred = np.asarray(greedy_everywhere(*nnx.split(model), tokens))[0]
    return preferred[len(prompt) - 1 : len(text) - 1].tolist() == answer


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_recomputation(golden, name) -> None:
    model = load_model(golden / "llama" / name, compute_dtype="float32")
    prompts = prompts_of([1, 7, 20], model.config.V)
    answers = greedy(model, prompts, 12)
    assert [len(answer) for answer in answers] == [12, 12, 12]
    assert all(is_greedy(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))


def test_the_first_token_is_that_of_the_golden_logits(golden) -> None:
    file = np.load(golden / "llama" / "llama2" / "logits.npz")
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    expected = file["logits"].argmax(-1)
    prompts = [row[:length].tolist() for row in file["tokens"] for length in (1, 5, 24)]
    firsts = [expected[row, length - 1] for row in range(len(expected)) for length in (1, 5, 24)]
    assert greedy(model, prompts, 1) == [[token] for token in firsts]


def test_quantized_with_an_adapter(golden) -> None:
    model = load_model(golden / "llama" / "llama1", QuantSpec(), "float32")
    load_adapter(model, golden / "peft" / "all_linear_r4")
    (prompt,) = prompts_of([5], model.config.V)
    (answer,) = greedy(model, [prompt], 20)
    assert is_greedy(model, prompt, answer)
    for name in model.config.linears:
        b = lora.linear(model, name).lora_b
        b.set_value(jnp.zeros_like(b.get_value()))
    assert not is_greedy(model, prompt, answer), "and an adapter that adds nothing gives another"


def test_ragged_batches_equal_one_by_one(tiny_model) -> None:
    # lengths on both sides of the padding, and longer than one prefill piece
    prompts = prompts_of([300, 3, 64, 65, 1], tiny_model.config.V)
    together = greedy(tiny_model, prompts, 10)
    assert greedy(tiny_model, prompts[:1], 10) == together[:1]
    assert all(is_greedy(tiny_model, prompt, answer) for prompt, answer in zip(prompts, together, strict=True))
    assert len(set(together[0])) > 3, "the test's model repeats itself"


def test_a_rows_draws_do_not_depend_on_its_neighbours(tiny_model) -> None:
    prompts = prompts_of([9, 20, 30], tiny_model.config.V)
    together = generate(tiny_model, prompts, 15, temperature=1.0, top_p=0.95, seed=3)
    assert generate(tiny_model, prompts[:2], 15, temperature=1.0, top_p=0.95, seed=3) == together[:2]
    assert generate(tiny_model, prompts, 15, temperature=1.0, top_p=0.95, seed=4) != together
    twice = generate(tiny_model, [prompts[0], prompts[0]], 15, temperature=1.0, top_p=0.95, seed=3)
    assert twice[0] == together[0] != twice[1]


def test_a_small_nucleus_is_greedy(tiny_model) -> None:
    prompts = prompts_of([9, 20], tiny_model.config.V)
    narrow = generate(tiny_model, prompts, 20, temperature=1.0, top_p=1e-6, seed=5)
    assert narrow == greedy(tiny_model, prompts, 20)


def test_prompts_that_are_read_at_once_are_answered_alike(tiny_model, monkeypatch) -> None:
    """As on a GPU: of several lengths, one beyond a piece's, filled up within the cache's room."""
    prompts = prompts_of([300, 3, 70], tiny_model.config.V)
    expected = greedy(tiny_model, prompts, 5)
    monkeypatch.setattr(decode, "is_for_cpu", lambda: False)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "_read", None)
        assert greedy(tiny_model, prompts, 5) == expected
    monkeypatch.setattr(decode, "WHOLE", 8 * 320 - 1)  # what its rows have together
    monkeypatch.setattr(decode, "_read_whole", None)
    assert greedy(tiny_model, prompts, 5) == expected


def test_prompts_that_are_read_at_once_have_few_lengths() -> None:
    lengths = {length: decode._whole(length, 2**20) for length in range(64, 4096 + 1, 64)}
    assert all(length <= whole <= 1.5 * length for length, whole in lengths.items())
    assert len(set(lengths.values())) == 12
    assert decode._whole(320, 320) == 320  # and never more than the room


def test_an_end_token_ends_its_row_alone(tiny_model) -> None:
    prompts = prompts_of([9, 20], tiny_model.config.V)
    free = greedy(tiny_model, prompts, 30)
    place = next(i for i, token in enumerate(free[0]) if i > 3 and token not in free[0][:i] and token not in free[1])
    ended = complete(tiny_model, prompts, Sampling(30, 0.0), [free[0][place], tiny_model.config.V + 5])
    assert [(row.tokens, row.reason) for row in ended] == [(free[0][:place], "eos"), (free[1], "length")]


def test_answers_longer_than_a_chunk(tiny_model, monkeypatch) -> None:
    prompts = prompts_of([9, 20], tiny_model.config.V)
    whole = generate(tiny_model, prompts, 23, temperature=1.0)
    monkeypatch.setattr(decode, "CHUNK", 5)
    assert generate(tiny_model, prompts, 23, temperature=1.0) == whole


def test_stop_is_asked_with_the_place_of_the_prompt(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 5)
    prompts = prompts_of([9, 20], tiny_model.config.V)
    ended = complete(
        tiny_model, prompts, Sampling(20, 0.0), [], stop=lambda number, tokens: number == 1 and len(tokens) > 8
    )
    assert [(len(row.tokens), row.reason) for row in ended] == [(20, "length"), (10, "stop")]


def test_the_context_ends_an_answer(golden) -> None:
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    prompts = prompts_of([50, 63], model.config.V)
    ended = complete(model, prompts, Sampling(100, 0.0), [])
    assert [(len(row.tokens), row.reason) for row in ended] == [(14, "context"), (1, "context")]
    assert is_greedy(model, prompts[0], ended[0].tokens)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([[5], []], "prompt 2 has no token"),
        ([[5, 96]], "token id 96; the model knows 0 to 95"),
        ([[-1]], "token id -1"),
        ([[5] * 64], "64 tokens; the model's context of 64 leaves no room"),
    ],
)
def test_impossible_prompts_are_named(golden, prompts, named) -> None:
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    with pytest.raises(InputError, match=named):
        generate(model, prompts, 5)


def test_no_prompts_no_answers(tiny_model) -> None:
    assert generate(tiny_model, [], 5) == []
    with pytest.raises(InputError, match="batch_size is 0"):
        generate(tiny_model, [[1]], 5, batch_size=0)


def test_a_cache_taken_over_changes_nothing(tiny_model) -> None:
    first, second = prompts_of([40, 100], tiny_model.config.V)
    room, sampling = room_for(tiny_model, 40, 20), Sampling(20, 0.0)
    earlier = Decoding(tiny_model, [first], sampling, [], [Draws(0, 0)], room)
    while not earlier.done:
        earlier.step(8)
    answer = earlier.tokens[0]
    for prompt in (first + answer + second, first + answer[:5] + second, second):
        later = Decoding(
            tiny_model, [prompt], sampling, [], [Draws(0, 0)], room_for(tiny_model, 200, 100), earlier=earlier
        )
        later.step(20)
        assert len(later.tokens[0]) == 20 and is_greedy(tiny_model, prompt, later.tokens[0])
        earlier = later


@pytest.mark.parametrize(
    ("quant", "sizes"), [(QuantSpec("none"), (1, 3, 16)), (QuantSpec(block_size=32), (3, 16))], ids=["float32", "nf4"]
)
def test_answers_do_not_depend_on_the_batch(tiny_folder, quant, sizes) -> None:
    model = load_model(tiny_folder, quant, "float32")
    prompts = prompts_of([9, 70, 30, 5, 60, 100, 3, 8, 20, 11, 12, 40, 50, 64, 65, 1, 33], model.config.V)
    answers = {size: generate(model, prompts, 24, temperature=0.7, seed=2, batch_size=size) for size in sizes}
    assert all(answers[size] == answers[16] for size in sizes)
    backwards = generate(model, prompts[::-1], 24, temperature=0.7, seed=2, batch_size=16)
    assert backwards[::-1] == answers[16]


def test_scores_have_equal_bits_in_batches_of_multiples_of_8(tiny_model) -> None:
    prompts = prompts_of([9, 70, 30, 5, 60, 100, 3, 8, 20, 11, 12, 40], tiny_model.config.V)

    def hidden(numbers: list[int], fill: int, room: int) -> dict[int, bytes]:
        batch = Decoding(
            tiny_model,
            [prompts[number] for number in numbers],
            Sampling(20, 0.0),
            [],
            [Draws(0, 0)] * len(numbers),
            room,
            fill,
        )
        batch.step(16)
        last = np.asarray(batch._rows.hidden)
        return {number: last[row].tobytes() for row, number in enumerate(numbers)}

    whole = hidden(list(range(12)), 4, 128)
    assert len(set(whole.values())) == 12
    for numbers, fill, room in (([2, 1, 0], 5, 128), ([11, 3, 7, 0], 12, 128), (list(range(8)), 0, 320)):
        part = hidden(numbers, fill, room)
        assert part == {number: whole[number] for number in numbers}


def test_draws_depend_on_prompt_and_seed_alone() -> None:
    a, b = [1, 2, 3], [1, 2, 4]
    draws = draws_of_all([a, b, a, a], 5)
    assert len(set(draws)) == 4 and draws[1] == draws_of_all([b], 5)[0] and draws[:1] == draws_of_all([a], 5)
    assert all(one != other for one, other in zip(draws, draws_of_all([a, b, a, a], 6), strict=True))
    own = draws_of_all([a, b, a, a], 5, [9, None, 9, None])
    assert own[0] == own[2] == draws_of_all([a], 9)[0]
    assert own[1] == draws[1] and own[3] == draws[0]


def test_the_rest_of_a_list_is_continued_as_with_the_whole(tiny_model) -> None:
    prompts = prompts_of([9, 70, 30, 5, 60, 3, 8], tiny_model.config.V)
    prompts.append(prompts[0])
    settings = (Sampling(12, 1.0, seed=1), [], 3)
    whole = list(complete_batches(tiny_model, prompts, *settings))
    assert [numbers for numbers, _ in whole] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    rest = list(complete_batches(tiny_model, prompts, *settings, order=range(3, 8)))
    assert rest == whole[1:]
    assert whole[2][1][1] != whole[0][1][0], "a prompt's second answer"


def test_decoding_ends_with_its_last_row(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 5)
    batches: list[Decoding] = []

    class Watched(Decoding):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            batches.append(self)

    monkeypatch.setattr(decode, "Decoding", Watched)
    prompts = prompts_of([9, 20], tiny_model.config.V)
    free = greedy(tiny_model, prompts, 30)
    assert batches[-1].steps == 30
    place = next(i for i, token in enumerate(free[0]) if 3 < i < 25 and token not in free[0][:i])
    complete(tiny_model, prompts[:1], Sampling(30, 0.0), [free[0][place]])
    assert batches[-1].steps == place + 1  # the end token is drawn too
    complete(tiny_model, prompts, Sampling(30, 0.0), [], stop=lambda number, tokens: len(tokens) > 6)
    assert batches[-1].steps == 10  # seen after the chunk in which the last row came to its stop


def test_a_stop_counts_whatever_comes_after_it(tiny_model) -> None:
    (prompt,) = prompts_of([9], tiny_model.config.V)
    (free,) = greedy(tiny_model, [prompt], 12)
    place = next(i for i, token in enumerate(free) if i > 3 and token not in free[:i])
    (ended,) = complete(tiny_model, [prompt], Sampling(12, 0.0), [free[place]], stop=lambda number, tokens: True)
    assert ended.reason == "stop"


def programs() -> list[int]:
    """How many programs are compiled."""
    return [jitted._cache_size() for jitted in vars(decode).values() if hasattr(jitted, "_cache_size")]


def test_programs_are_kept_between_calls_and_models(tiny_folder) -> None:
    prompts = prompts_of([9, 20], 400)
    greedy(load_model(tiny_folder, compute_dtype="float32"), prompts, 10)
    compiled = programs()
    assert sum(compiled) >= 2
    generate(load_model(tiny_folder, compute_dtype="float32"), prompts[::-1], 12, temperature=0.5, top_p=0.3, seed=8)
    assert programs() == compiled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_and_no_token(tiny_model, temperature):
    """Where a row comes to them, and not before: NaN in the embedding of a token that only one of the prompts has."""
    broken = nnx.clone(tiny_model)
    table = np.asarray(broken.embedding.get_value()).copy()
    table[7] = np.nan
    broken.embedding.set_value(jnp.asarray(table))
    prompts = [[1, 20, 30], [1, 20, 7], [1, 40]]
    sampling = Sampling(4, temperature, 0.9)
    whole = complete(tiny_model, [prompts[0], prompts[2]], sampling, [], 8)
    assert complete(broken, [prompts[0], prompts[2]], sampling, [], 8) == whole
    with pytest.raises(
        InputError, match=r"logits after 3 tokens \(prompt . of its batch\) hold NaN or inf: the model's"
    ):
        complete(broken, prompts, sampling, [], 8)
    draws = draws_of_all([prompts[1]], 0)
    chat = Decoding(broken, [prompts[1]], sampling, [], draws, room_for(broken, 3, 4))
    with pytest.raises(InputError, match="hold NaN or inf"):
        chat.step(16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_logit_that_is_not_finite_is_enough(tiny_model, bad):
    broken = nnx.clone(tiny_model)
    head = np.asarray(broken.head.get_value()).copy()
    head[399, 5] = bad
    broken.head.set_value(jnp.asarray(head))
    with pytest.raises(InputError, match="hold NaN or inf"):
        greedy(broken, [[1, 20, 30]], 2)


def test_adapters_are_rounded_once_and_not_for_every_token(golden) -> None:
    """In bfloat16: the program has no float32 adapter, and its answers are those of one that rounds as it goes."""
    model = load_model(golden / "llama" / "llama1", QuantSpec(), "bfloat16")
    load_adapter(model, golden / "peft" / "all_linear_r4")
    prompts = prompts_of([5, 9], model.config.V)
    sampling = Sampling(12, 0.0)

    def answers(decoding: Decoding) -> list[list[int]]:
        decoding.step(12)
        return decoding.tokens

    start = partial(Decoding, model, prompts, sampling, (), draws_of_all(prompts, 0), room_for(model, 9, 12))
    rounded = start()
    arrays = jax.tree.leaves(nnx.filter_state(rounded._state, nnx.LoRAParam))
    assert arrays and all(array.dtype == jnp.bfloat16 for array in arrays)
    as_it_goes = start()
    as_it_goes._graph, as_it_goes._state = nnx.split(model)
    assert answers(rounded) == answers(as_it_goes)
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))), (
        "the model's own"
    )
