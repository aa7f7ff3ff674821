"""The adapter class for lm-eval: likelihoods, rolling windows and answers equal the model's own, called plainly."""

import numpy as np
import pytest
from flax import nnx

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from qlora_jax.errors import InputError
from qlora_jax.evaluate.harness import HarnessModel
from qlora_jax.evaluate.perplexity import perplexity
from qlora_jax.generate.decode import generate
from qlora_jax.io.load import load_model
from qlora_jax.text.tokenizer import Tokenizer
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

CONTEXT = 64
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("harness") / "model", CONTEXT)


@pytest.fixture(scope="module")
def adapted(folder):
    return HarnessModel(load_model(folder, compute_dtype="float32"), Tokenizer.from_folder(folder), "tiny")


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("task", i, 1)) for i, args in enumerate(arguments)]


@nnx.jit
def all_logits(model, tokens):
    return model.logits(model(tokens)[0])


def plain(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of ids[1:] and whether each was the likeliest; at most CONTEXT are read."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    x = np.asarray(all_logits(model, padded), np.float64)[0, : len(ids) - 1]
    logprobs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return logprobs[np.arange(len(x)), ids[1:]], x.argmax(-1) == ids[1:]


def test_loglikelihood(adapted):
    encode = adapted._tokenizer.encode
    pairs = [("The quick", " brown fox"), ("The quick", " red"), ("The quick ", "red"), ("", TEXT), (TEXT * 9, " dog")]
    found = adapted.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = encode(context + continuation, bos=True)
        scored = len(ids) - len(encode(context.rstrip(), bos=True))  # a blank at the end belongs to what follows
        ids = ids[-(CONTEXT + 1) :]
        logprobs, likeliest = plain(adapted.model, ids)
        assert logprob == pytest.approx(logprobs[-scored:].sum(), abs=1e-3), (context, continuation)
        assert greedy == bool(likeliest[-scored:].all())
    assert found[1] == found[2]


def test_continuations_of_one_token_and_the_likeliest(adapted):
    (start,) = requests("loglikelihood", ("The quick", ""))
    ids = adapted.tok_encode("The quick")
    likeliest = int(
        np.asarray(all_logits(adapted.model, np.array([ids + [0] * (CONTEXT - len(ids))])))[0, len(ids) - 1].argmax()
    )
    found = adapted._loglikelihood_tokens(
        [(None, ids, [likeliest]), (None, ids, [likeliest - 1]), (None, ids, [])], True
    )
    assert found[0][1] and not found[1][1] and found[2] == (0.0, True)
    with pytest.raises(InputError, match="a continuation of 65 tokens; the model's context is 64"):
        adapted._loglikelihood_tokens([(None, ids, [5] * 65)], True)


def test_bos_and_control_tokens(adapted):
    bos, encode = adapted._tokenizer.bos_id, adapted._tokenizer.encode
    assert adapted.tok_encode("fox") == [bos, *encode("fox")]
    assert adapted.tok_encode("<s>fox")[0] == bos and adapted.tok_encode("<s>fox").count(bos) == 1
    assert adapted.tok_encode("fox", add_special_tokens=False) == encode("fox")
    assert adapted.tok_encode("fox</s>", add_special_tokens=False)[-1] == adapted.eot_token_id
    assert (adapted.prefix_token_id, adapted.max_length) == (bos, CONTEXT)


def test_rolling_equals_perplexity_where_a_text_fits_and_slides_where_not(adapted):
    ids = adapted._tokenizer.encode(TEXT)
    assert len(ids) < CONTEXT
    long = TEXT * 6
    found = adapted.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,), (long,), ("",)), True)
    short = perplexity(adapted.model, [ids], adapted.prefix_token_id)
    assert found[0] == pytest.approx(-short.nll_per_token * short.tokens, abs=1e-3)
    # the harness's windows, written out: BOS and 63 tokens, then 64 of which the first were scored before
    whole = [adapted.prefix_token_id, *adapted._tokenizer.encode(long)]
    total, scored = 0.0, 1
    while scored < len(whole):
        end = min(scored + CONTEXT, len(whole))
        window = whole[max(end - CONTEXT - 1, 0) : end]
        total += plain(adapted.model, window)[0][-(end - scored) :].sum()
        scored = end
    assert found[1] == pytest.approx(total, abs=1e-2)
    assert found[2] == 0


def test_answers(adapted):
    tokenizer = adapted._tokenizer
    contexts = ["The quick", TEXT * 9]
    ask = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    prompts = [tokenizer.encode(text, bos=True)[-(CONTEXT - 12) :] for text in contexts]
    expected = [tokenizer.decode(new) for new in generate(adapted.model, prompts, 12, 0.0, eos_ids=tokenizer.eos_ids)]
    # requests of several settings: each goes by its own, up to its stop string
    stop = expected[0][3:5]
    stopping = {**ask, "until": stop}
    asked = [(contexts[0], ask), (contexts[0], stopping), (contexts[1], stopping), (contexts[1], ask)]
    found = adapted.generate_until(requests("generate_until", *asked), True)
    assert found == [expected[0], expected[0].split(stop)[0], expected[1].split(stop)[0], expected[1]]
    sampled = {"until": ["\n"], "max_new_tokens": 12, "do_sample": True, "temperature": 5.0, "top_p": 0.9}
    one, two = adapted.generate_until(requests("generate_until", (contexts[0], sampled), (contexts[0], sampled)), True)
    assert one != two


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        ({"num_beams": 4}, "ask for num_beams = 4"),
        ({"do_sample": True, "temperature": 1.0, "typical_p": 0.5}, "ask for typical_p = 0.5"),
        ({"max_gen_toks": 64}, "generates 64 tokens, the model's context is 64"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1"),
    ],
)
def test_what_is_not_there_is_said(adapted, ask, named):
    with pytest.raises(InputError, match=named):
        adapted.generate_until(requests("generate_until", ("The", {"until": ["."], "max_gen_toks": 4, **ask})), True)


def test_chat_templates(folder):
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    adapted = HarnessModel(load_model(folder, compute_dtype="float32"), tokenizer, "a/b")
    turns = [{"role": "user", "content": "Hi"}]
    text = adapted.apply_chat_template(turns)
    assert text == "<s>[user] Hi</s>[assistant]"
    assert adapted.tok_encode(text)[0] == tokenizer.bos_id and adapted.tok_encode(text).count(tokenizer.bos_id) == 1
    begun = adapted.apply_chat_template([*turns, {"role": "assistant", "content": "The answer"}], False)
    assert begun == "<s>[user] Hi</s>[assistant] The answer"
    assert adapted.chat_template(True) == tokenizer.chat_template
    assert adapted.tokenizer_name.startswith("a__b-") and "/" not in adapted.tokenizer_name


def test_other_contexts_and_tokenizers(adapted, golden):
    with pytest.raises(InputError, match="context is 65; expected 2 to the model's 64 tokens"):
        HarnessModel(adapted.model, adapted._tokenizer, context=65)
    small = load_model(golden / "llama" / "llama1", compute_dtype="float32")
    with pytest.raises(InputError, match="but the model's vocabulary is 0 to 95"):
        HarnessModel(small, adapted._tokenizer).tok_encode("quick fox")
