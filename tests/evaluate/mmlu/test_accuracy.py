"""Prompts to the letter, the tokens that count as answers, accuracies and their intervals."""

import math

import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu import accuracy as mmlu
from qlora_jax.evaluate.mmlu.data import Question, Questions, load_questions
from qlora_jax.evaluate.mmlu.prompts import answer_tokens, fitting, make_prompts, prompt_text
from qlora_jax.evaluate.scoring import option_logits_of
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.text.tokenizer import Tokenizer
from tests.evaluate.mmlu.mmlu_files import EMBEDDED, write_checkpoint, write_owners_folder

pytestmark = pytest.mark.quick_compile

SHOT = Question("us_foreign_policy", "One?", ("1", "2", "3", "4"), "C")
ASKED = Question("us_foreign_policy", "Two?", ("x", "y", "z", "w"), "D")
# written out from the owners' evaluate.py; format_subject puts a blank before each word, so there are two
PROMPT = (
    "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
    "One?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: C\n\n"
    "Two?\nA. x\nB. y\nC. z\nD. w\nAnswer:"
)


def test_prompt_to_the_letter():
    assert prompt_text(ASKED, [SHOT]) == PROMPT


def test_shots_are_dropped_from_the_last_on():
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    other = Question("us_foreign_policy", "Three?", ("p", "q", "r", "s"), "A")
    questions = Questions([ASKED], {"us_foreign_policy": [SHOT, other]})
    whole, one, none = (
        [tokenizer.bos_id, *tokenizer.encode(prompt_text(ASKED, s))] for s in ([SHOT, other], [SHOT], [])
    )
    for context, ids, shortened, cut in (
        (len(whole), whole, 0, 0),
        (len(whole) - 1, one, 1, 0),
        (len(one), one, 1, 0),
        (len(one) - 1, none, 1, 0),
        (len(none), none, 1, 0),
        (len(none) - 2, [tokenizer.bos_id, *none[3:]], 1, 1),
    ):
        found = make_prompts(questions, 2, tokenizer, context, 1024)
        assert (found.ids, found.shortened, found.cut) == ([ids], shortened, cut), context
    assert fitting(found) == "1 prompts with fewer shots and 1 cut at their beginning, to fit the context"
    with pytest.raises(InputError, match="no room"):
        make_prompts(questions, 2, tokenizer, 1, 1024)
    with pytest.raises(InputError, match="the model's vocabulary is 0 to 99"):
        make_prompts(questions, 2, tokenizer, 128, 100)


def test_answers_are_what_the_tokenizer_writes(golden):
    tokenizer = Tokenizer.from_folder(EMBEDDED)
    lead, options = answer_tokens(tokenizer, [PROMPT, prompt_text(ASKED, [])])
    assert lead == []
    for letter, option in zip("ABCD", options, strict=True):
        assert tokenizer.encode(f"{PROMPT} {letter}") == [*tokenizer.encode(PROMPT), option]
    with pytest.raises(InputError, match="no single token for each"):  # it has a token for " A" alone
        answer_tokens(Tokenizer.from_folder(golden / "tokenizer"), [PROMPT])


def test_answers_of_llama(shared_data):
    tokenizer = Tokenizer.from_folder(shared_data / "tokenizers" / "llama2_32k")
    assert answer_tokens(tokenizer, [PROMPT]) == ([], [319, 350, 315, 360])  # the pieces with a blank before the letter
    asked = load_questions(str(shared_data / "mmlu" / "zero_shot_mmlu_val.json"), "val", 0)
    found = make_prompts(asked, 0, tokenizer, 2048, 32000)
    assert found.options == [319, 350, 315, 360] and (found.shortened, found.cut) == (0, 0)


class Letters:
    """A tokenizer of one token a character, but for the texts in `tokens`."""

    prefix = ()

    def __init__(self, tokens):
        self.tokens = tokens

    def encode(self, text):
        for old, new in self.tokens.items():
            text = text.replace(old, new)
        return [ord(letter) for letter in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_tokenizer_that_keeps_the_blank_apart():
    found = make_prompts(Questions([ASKED], {}), 0, Letters({}), 512, 512)
    assert found.options == [*map(ord, "ABCD")]
    assert "".join(map(chr, found.ids[0])) == prompt_text(ASKED, []) + " "


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ({": A": "\ue000"}, "changes the tokens before it"),
        ({": B": "\ue000"}, "no single token for each"),
        (
            {" A": "\ue000\ue001", " B": "\ue000\ue002", " C": "\ue000\ue003", " D": "\ue000\ue004"},
            "takes 2 tokens for it",
        ),
        ({" A": "\ue000", " B": "\ue000", " C": "\ue000", " D": "\ue000"}, "no single token for each"),
        ({"1\nAnswer: A": "1\nAnswer:\ue000"}, "in 2 ways, depending on the question"),
    ],
)
def test_tokenizers_without_an_answer_token(tokens, named):
    with pytest.raises(InputError, match=named):
        answer_tokens(Letters(tokens), ["q\nA. 1\nAnswer:", "q\nA. 2\nAnswer:"])


@nnx.jit
def next_logits(model, tokens, last):
    return model.logits(model(tokens)[0][0, last])


def test_choices_are_those_of_the_model_called_plainly(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    tokenizer = Tokenizer.from_folder(folder)
    questions = load_questions(str(write_owners_folder(tmp_path / "data")), "test", 1)
    prompts = make_prompts(questions, 1, tokenizer, 512, 1024)
    model = load_model(folder, QuantSpec("nf4", 64, True), "float32")
    logits = mmlu.answer(option_logits_of(model), prompts)
    expected = []
    for ids in prompts.ids:
        padded = np.asarray([ids + [0] * (256 - len(ids))], np.int32)
        expected.append(np.asarray(next_logits(model, padded, len(ids) - 1))[prompts.options])
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(1), np.argmax(expected, 1))
    # what is known is not asked again; what is new is kept
    kept: dict = {}
    known = {number: [0.0, 1.0, 2.0, 3.0] for number in range(len(prompts.ids)) if number != 4}
    again = mmlu.answer(option_logits_of(model), prompts, 5, known, kept.update)
    assert list(kept) == [4] and (again[np.arange(len(again)) != 4] == [0, 1, 2, 3]).all()
    np.testing.assert_allclose(again[4], logits[4], atol=1e-4)


def made(subject: str, right: int, n: int) -> tuple[list[Question], list[list[float]]]:
    """Questions all answered A, of which the first `right` are right."""
    asked = [Question(subject, "q", ("a", "b", "c", "d"), "A" if i < right else "C") for i in range(n)]
    return asked, [[2.0, 1.0, 0.0, -1.0]] * n


def test_results():
    parts = [made("anatomy", 3, 4), made("virology", 0, 6), made("astronomy", 10, 10)]
    questions = [question for asked, _ in parts for question in asked]
    found = mmlu.results(questions, np.asarray([row for _, rows in parts for row in rows]))
    assert found["accuracy_subjects"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert (found["accuracy_questions"], found["correct"], found["questions"]) == (13 / 20, 13, 20)
    assert found["categories"]["other"] == {
        "accuracy": 0.3, "correct": 3, "questions": 10,
        "low": pytest.approx(0.107789, abs=1e-5), "high": pytest.approx(0.603222, abs=1e-5),
    }  # fmt: skip
    assert list(found["categories"]) == ["STEM", "other"] and list(found["subjects"])[0] == "anatomy"
    assert found["subcategories"]["health"]["questions"] == 10
    variance = sum(p * (1 - p) / n for p, n in ((5 / 8, 4), (2 / 10, 6), (12 / 14, 10))) / 9
    half = 1.959964 * math.sqrt(variance)
    low, high = found["accuracy_subjects_interval"]
    assert (low, high) == (pytest.approx(1.75 / 3 - half), pytest.approx(1.75 / 3 + half))


def test_the_interval_over_subjects_covers_as_it_says():
    rng = np.random.default_rng(0)
    p, n = rng.uniform(0.25, 0.9, 20), rng.integers(8, 60, 20)
    covered = 0
    for _ in range(1000):
        tallies = [mmlu.Tally(int(k), int(size)) for k, size in zip(rng.binomial(n, p), n, strict=True)]
        _, low, high = mmlu.subject_mean(tallies)
        covered += low <= p.mean() <= high
    assert 930 <= covered <= 980


def test_equal_logits_count_for_the_first_letter():
    questions, _ = made("anatomy", 1, 2)
    assert mmlu.results(questions, np.zeros((2, 4)))["correct"] == 1


def test_samples_are_drawn_by_the_seed():
    questions = Questions([Question("anatomy", str(i), ("a", "b", "c", "d"), "A") for i in range(50)], {})
    one, same, other = (mmlu.sample(questions, 10, seed).asked for seed in (0, 0, 1))
    assert one == same != other and len(one) == 10 and one == sorted(one, key=lambda q: int(q.question))
    assert mmlu.sample(questions, 0, 0).asked == mmlu.sample(questions, 99, 0).asked == questions.asked
