"""MMLU's prompts as token ids, and which four tokens are the answers.

The prompt is the owners' (evaluate.py of hendrycks/test), two blanks before the subject included:

    The following are multiple choice questions (with answers) about  SUBJECT.

    QUESTION
    A. CHOICE
    ...
    Answer: A

    QUESTION
    ...
    Answer:

Shots are dropped from the last on where a prompt would not fit the context; one that does not fit without any loses
tokens behind BOS. The answer is what follows: " A", " B", " C" or " D", as the tokenizer writes them there.
"""

import dataclasses
from collections.abc import Sequence

from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu.data import LETTERS, Question, Questions
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """ids: of each prompt, BOS included, up to where the letter comes. options: the ids of A, B, C, D.

    shortened: prompts with fewer shots than asked for; cut: those that lost tokens of their beginning.
    """

    ids: list[list[int]]
    options: list[int]
    shortened: int
    cut: int


def prompt_text(question: Question, shots: Sequence[Question]) -> str:
    """The prompt of a question after some of its subject's dev questions."""
    if question.prompt:
        return question.prompt
    begin = (
        f"The following are multiple choice questions (with answers) about  {question.subject.replace('_', ' ')}.\n\n"
    )
    return begin + "".join(f"{_asked(shot)} {shot.answer}\n\n" for shot in shots) + _asked(question)


def _asked(question: Question) -> str:
    choices = zip(LETTERS, question.choices, strict=True)
    return question.question + "".join(f"\n{letter}. {choice}" for letter, choice in choices) + "\nAnswer:"


def make_prompts(questions: Questions, shots: int, tokenizer: Tokenizer, context: int, V: int) -> Prompts:
    """Prompts of at most `context` tokens.

    Args:
      shots: dev questions before each.
      V: the model's vocabulary.
    Raises:
      InputError: the tokenizer has no single token for each answer after such a prompt, or ids outside the vocabulary.
    """
    before = list(tokenizer.prefix)
    texts = [prompt_text(question, questions.shots.get(question.subject, [])[:shots]) for question in questions.asked]
    lead, options = answer_tokens(tokenizer, texts)
    room = context - len(before) - len(lead)
    if room < 1:
        raise InputError(f"a context of {context} tokens has no room for a question of MMLU")
    shortened = cut = 0
    ids = tokenizer.encode_batch(texts)
    for number, question in enumerate(questions.asked):
        kept = 0 if question.prompt else shots
        while len(ids[number]) > room and kept:
            kept -= 1
            ids[number] = tokenizer.encode(prompt_text(question, questions.shots[question.subject][:kept]))
        shortened += not question.prompt and kept < shots
        cut += len(ids[number]) > room
        ids[number] = before + ids[number][-room:] + lead
    highest = max(max(map(max, ids)), max(options))
    if highest >= V:
        raise InputError(f"token id {highest}, but the model's vocabulary is 0 to {V - 1} (is it its tokenizer?)")
    return Prompts(ids, options, shortened, cut)


def answer_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """What the tokenizer makes of " A", " B", " C", " D" after these prompts.

    Returns:
      lead: ids between the prompt's and the letter's: [], or [the blank] where a tokenizer keeps it apart.
      options: the four letters' ids.
    Raises:
      InputError: a letter is not one token, the four do not differ in it alone, or it changes the tokens before it.
    """
    where = 'MMLU scores " A" to " D" after "Answer:", but this tokenizer'
    plain, answered = tokenizer.encode_batch(texts), tokenizer.encode_batch([text + " A" for text in texts])
    added = set()
    for ids, longer in zip(plain, answered, strict=True):
        if longer[: len(ids)] != ids:
            raise InputError(f"{where} changes the tokens before it when an answer follows")
        added.add(tuple(longer[len(ids) :]))
    if len(added) > 1:
        raise InputError(f"{where} writes it in {len(added)} ways, depending on the question")
    ends = [tokenizer.encode(f"{texts[0]} {letter}")[len(plain[0]) :] for letter in LETTERS]
    lead, options = ends[0][:-1], [end[-1] for end in ends if end]
    if any(end[:-1] != lead for end in ends) or len(set(options)) < len(LETTERS):
        raise InputError(f"{where} has no single token for each: {', '.join(map(str, ends))}")
    if len(lead) > 1 or tokenizer.decode(lead).strip():
        raise InputError(
            f"{where} takes {len(lead) + 1} tokens for it: {ends[0]}; expected one, or a blank and a letter"
        )
    return lead, options


def fitting(prompts: Prompts) -> str:
    """How many prompts did not fit the context as they were, in words."""
    if not prompts.shortened and not prompts.cut:
        return "all prompts fit the context"
    return (
        f"{prompts.shortened:,} prompts with fewer shots and {prompts.cut:,} cut at their beginning, to fit the context"
    )
