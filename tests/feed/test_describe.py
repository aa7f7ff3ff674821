"""Examples shown as the loss sees them, lengths and padding, worked out by hand."""

import numpy as np

from qlora_jax.data.chat_examples import tokenize_chats
from qlora_jax.data.examples import Example, tokenize_example
from qlora_jax.feed.batches import Batches
from qlora_jax.feed.describe import histogram, show_example
from qlora_jax.feed.padding import padding
from qlora_jax.text.chat import Chat
from tests.chat_templates import LLAMA3, TWO_TURNS
from tests.data.test_chat_examples import with_template


def test_what_is_learned_is_marked(byte_tokenizer):
    example = tokenize_example("Q: ", "grün\nA", byte_tokenizer, 16, 16)
    assert show_example(example, byte_tokenizer, False) == "<BOS>Q: ⟦grün\nA<EOS>⟧"
    assert show_example(example, byte_tokenizer, True) == "\x1b[2m<BOS>Q: \x1b[0m\x1b[32mgrün\nA<EOS>\x1b[0m"
    control = tokenize_example("\x1b[2J", "\r\tA", byte_tokenizer, 16, 16)
    assert show_example(control, byte_tokenizer, False) == "<BOS>\ufffd[2J⟦\ufffd\tA<EOS>⟧"
    learned = tokenize_example("Q", "A", byte_tokenizer, 16, 16, train_on_source=True)
    assert show_example(learned, byte_tokenizer, False) == "<BOS>⟦QA<EOS>⟧"


def test_every_learned_turn_of_a_chat_is_marked(golden, tmp_path):
    tokenizer = with_template(tmp_path / "chat", golden / "chat", LLAMA3)
    example = tokenize_chats([Chat(TWO_TURNS, None, "")], tokenizer, 999)[0][0]
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    first, second = (f"⟦{TWO_TURNS[n]['content']}<|eot_id|>⟧" for n in (1, 3))
    assert show_example(example, tokenizer, False) == (
        f"<BOS>{user}{TWO_TURNS[0]['content']}<|eot_id|>{assistant}{first}"
        f"{user}{TWO_TURNS[2]['content']}<|eot_id|>{assistant}{second}"
    )
    assert show_example(example, tokenizer, True).count("\x1b[32m") == 2


def test_histogram():
    assert histogram([1, 8, 9, 24], 8) == [
        f"      1 to       8 tokens         2 {'#' * 40}",
        f"      9 to      16 tokens         1 {'#' * 20}",
        f"     17 to      24 tokens         1 {'#' * 20}",
    ]
    lines = histogram([5, 1000], 64)
    assert len(lines) == 16 and lines[1] == "     65 to     128 tokens         0"


def test_padding_is_that_of_the_batches():
    lengths = np.random.default_rng(0).integers(2, 90, 53)
    examples = [Example(np.ones(n, np.int32), np.ones(n, np.bool_)) for n in lengths]
    batches = Batches(examples, 4, True, 16, 0, 0)
    found = padding(batches)
    made = [batches.batch(step) for step in range(batches.steps_per_epoch)]
    assert found.padded == sum(batch["tokens"].size for batch in made)
    assert found.tokens == sum(int(batch["tokens"].sum()) for batch in made)  # every token is 1, padding is 0
    assert found.waste == 1 - found.tokens / found.padded
    assert sum(found.steps_by_length.values()) == len(made)
    assert set(found.steps_by_length) == {batch["tokens"].shape[1] for batch in made}
