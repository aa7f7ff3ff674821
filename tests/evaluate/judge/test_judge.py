"""What a judge is asked and what is made of its text: parsers, prompts, pairs, cost, the file of verdicts."""

import json
import os

import pytest

from qlora_jax.errors import InputError
from qlora_jax.evaluate.judge.cost import estimate
from qlora_jax.evaluate.judge.pairs import Answers, Question, compare, read_answers, read_questions
from qlora_jax.evaluate.judge.parse import relative_score, threeclass_score
from qlora_jax.evaluate.judge.prompts import PROMPTS, REVIEWERS, read_prompts
from qlora_jax.evaluate.judge.store import SETTINGS, VerdictFile
from qlora_jax.evaluate.judge.summary import order_table, steadiness

NONE = [-1.0, -1.0]
ROW = dict.fromkeys(SETTINGS, "x") | {"first": "a", "second": "b", "item_id": 1, "score": 1, "request": "0"}


@pytest.mark.parametrize(
    "text, score",
    [
        ("Both fine.\n3", 3),
        ("1", 1),
        ("Reasons.\n\n**2**\n \n", 2),
        ("Reasons.\nFinal answer: 1.", 1),
        ("Reasons.\r\n2\r\n", 2),
        ("```\n1\n```", 1),
        ("2\nBecause it is longer.", -1),  # the number is wanted last
        ("I choose 1 or 2", -1),
        ("Assistant 1 is better", -1),
        ("4", -1),
        ("12", -1),
        ("1.5", -1),
        ("-1", -1),
        ("\N{ARABIC-INDIC DIGIT ONE}", -1),
        ("", -1),
        ("\n\n", -1),
    ],
)
def test_threeclass_reads_the_last_line(text, score) -> None:
    assert threeclass_score(text, cut_off=False) == score
    assert threeclass_score(text, cut_off=True) == -1  # "2" may be the beginning of a list


@pytest.mark.parametrize(
    "text, score",
    [
        ("8 9\nThe second is better.", [8, 9]),
        ("8, 9\nx", [8, 9]),
        ("\n**7.5 10**\nx", [7.5, 10]),
        ("(8, 9)\nx", [8, 9]),
        ("Scores: 8 9\nx", [8, 9]),
        ("8 9 7\nx", NONE),
        ("8\n9", NONE),
        ("0 8\nx", NONE),  # the scale begins at 1
        ("8 95\nx", NONE),
        ("8/10\nx", NONE),
        ("-8 9\nx", NONE),
        ("I give 8 9\nx", NONE),
        ("The point is\n(3, 4)\nBoth are right.", NONE),
        ("nan 8\nx", NONE),
        ("", NONE),
    ],
)
def test_relative_reads_the_first_line(text, score) -> None:
    assert relative_score(text, cut_off=False, tuple_wanted=False) == score


@pytest.mark.parametrize(
    "text, score",
    [
        ("I solve it.\n(8, 9)\nThe second is better.", [8, 9]),
        ("```python\nscores = (8, 9.5)\n```", [8, 9.5]),
        ("Scores:\nAssistant 1: 2/10 (wrong)\n**Assistant 2:** 10/10", [2, 10]),
        ("Assistant 1: 2\nAssistant 2: 9\n\nOutput: (2, 9)", [2, 9]),
        ("Assistant 1: 2\nAssistant 2: 9\n\nOutput: (9, 2)", NONE),  # which of them?
        ("The point is (3, 4).", NONE),
        ("(3, 4)\n(8, 9)", [3, 4]),  # a first line is what the other prompts want
        ("So:\n(3, 4)\nand\n(8, 9)", NONE),
        ("Assistant 1: -5\nAssistant 2: 9", NONE),
        ("Assistant 2: 5\nAssistant 1: 9", NONE),
    ],
)
def test_relative_reads_a_tuple_where_it_is_wanted(text, score) -> None:
    assert relative_score(text, cut_off=False, tuple_wanted=True) == score


def test_a_line_that_was_cut_off_is_no_score() -> None:
    assert relative_score("8 1", cut_off=True, tuple_wanted=False) == NONE
    assert relative_score("8 1\nThe", cut_off=True, tuple_wanted=False) == [8, 1]


def test_released_ratings_are_read_as_their_authors_read_them(shared_data) -> None:
    files = sorted((shared_data / "vicuna_bench" / "ratings").glob("*.jsonl"))
    maths = {question.item for question in read_questions(vicuna(shared_data)) if question.category == "math"}
    assert len(files) == 3
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 80
        for row in rows:
            ours = (
                threeclass_score(row["text"], False)
                if "threeclass" in file.name
                else relative_score(row["text"], False, row["question_id"] in maths)
            )
            assert ours == row["score"], row["text"]


def vicuna(shared_data):
    return shared_data / "vicuna_bench" / "question.jsonl"


def test_released_questions_answers_and_prompts(shared_data) -> None:
    bench, oa = shared_data / "vicuna_bench" / "generations", shared_data / "oa_bench"
    assert read_questions(vicuna(shared_data)) == read_questions(oa / "vicuna_questions.jsonl")
    assert [len(read_questions(path)) for path in (vicuna(shared_data), oa / "oa_questions.jsonl")] == [80, 953]
    systems = [read_answers(str(path)) for path in sorted(bench.glob("*.jsonl"))]
    assert [system.name for system in systems] == ["7b-guanaco", "gpt-3.5-turbo:20230327"]
    assert [len(system.texts) for system in systems] == [80, 80]
    assert systems[0].texts["1"].startswith("Time management is a crucial skill")  # the generation, not the question
    prompts = read_prompts(oa / "vicuna_prompt_relative.jsonl", oa / "reviewer.jsonl")
    assert [prompts.of(name).tuple_wanted for name in ("math", "coding", "fermi")] == [True, False, False]
    assert prompts.of("fermi") == prompts.of("generic") != prompts.of("coding")
    only = read_prompts(oa / "oa_prompt_threeclass.jsonl", oa / "oa_reviewer.jsonl")
    assert only.of("math") == only.of("generic") and (only.of("x").temperature, only.of("x").max_tokens) == (0.2, 1024)
    assert len(compare(read_questions(vicuna(shared_data)), systems)) == 160


@pytest.mark.parametrize("protocol", ["threeclass", "relative"])
def test_our_own_prompts_show_question_and_answers_once_and_in_order(protocol) -> None:
    prompts = read_prompts(PROMPTS[protocol], REVIEWERS)
    texts = {}
    for category in ("general", "coding", "math"):
        system, user = prompts.of(category).messages("{q} %s", "{answer_2}", "{0.__class__}")
        places = [user["content"].index(part) for part in ("{q} %s", "{answer_2}", "{0.__class__}")]
        assert places == sorted(places) and user["content"].count("{answer_2}") == 1  # texts are never templates
        assert (system["role"], user["role"]) == ("system", "user")
        texts[category] = user["content"]
    assert len(set(texts.values())) == 3
    assert prompts.of("math").tuple_wanted == (protocol == "relative")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt_template": "{question} {answer_1}"}, "line 1: prompt_template has the fields question, answer_1"),
        ({"prompt_template": "{question} {answer_1} {answer_2} {prompt.x}"}, "prompt.x"),
        ({"prompt_template": "{question} {answer_1} {answer_2!r}"}, "expected question, answer_1, answer_2"),
        ({"prompt_template": "{question} {answer_1} {answer_2} {"}, "a brace that is meant is written twice"),
        ({"defaults": "x"}, "defaults is 'x'"),
        ({"prompt_id": 7}, "category general has prompt 1"),
        ({"system_prompt": None}, "system_prompt is None"),
    ],
)
def test_broken_prompts(tmp_path, change, words) -> None:
    prompt = json.loads(PROMPTS["threeclass"].read_text().splitlines()[0]) | change
    reviewer = {"prompt_id": 1, "metadata": {"temperature": 0.2, "max_tokens": 9}, "category": "general"}
    (tmp_path / "p.jsonl").write_text(json.dumps(prompt) + "\n")
    (tmp_path / "r.jsonl").write_text(json.dumps(reviewer) + "\n")
    with pytest.raises(InputError, match=words.replace("{", "\\{")):
        read_prompts(tmp_path / "p.jsonl", tmp_path / "r.jsonl")


QUESTIONS = [Question(i, f"q{i}", "math" if i == 2 else "") for i in range(3)]


def answers(name: str, items=range(3)) -> Answers:
    return Answers(name, {str(i): f"{name}{i}" for i in items})


def test_pairs_orders_and_baseline() -> None:
    systems = [answers("b"), answers("a"), answers("c")]
    both = compare(QUESTIONS, systems)
    assert len(both) == 3 * 3 * 2 and len({each.key for each in both}) == 18
    assert [each.key[1:] for each in both[:2]] == [("b", "a"), ("a", "b")]
    assert all(
        (each.answer_1, each.answer_2) == (f"{each.first}{each.key[0]}", f"{each.second}{each.key[0]}") for each in both
    )
    assert {each.key[1:] for each in compare(QUESTIONS, systems, "first")} == {("b", "a"), ("b", "c"), ("a", "c")}
    assert {each.key[1:] for each in compare(QUESTIONS, systems, "first", "c")} == {("b", "c"), ("a", "c")}


def test_random_orders_stay_when_systems_and_questions_are_added() -> None:
    questions = [Question(i, "q", "") for i in range(200)]
    systems = [answers(name, range(200)) for name in "ab"]
    drawn = {each.key for each in compare(questions, systems, "random", seed=1)}
    assert len(drawn) == 200 and 70 < sum(first == "a" for _, first, _ in drawn) < 130
    assert drawn <= {
        each.key for each in compare(questions, [answers("c", range(200)), *systems[::-1]], "random", seed=1)
    }
    assert drawn != {each.key for each in compare(questions, systems, "random", seed=2)}


def test_answers_that_are_missing() -> None:
    systems = [answers("a"), answers("b", [1])]
    with pytest.raises(InputError, match=r"b: no answer to question 0 \(2 of 3 missing\)"):
        compare(QUESTIONS, systems)
    assert [each.key[0] for each in compare(QUESTIONS, systems, "first", partial=True)] == ["1"]
    with pytest.raises(InputError, match="no question that two systems have answered"):
        compare(QUESTIONS, [answers("a", [0]), answers("b", [1])], partial=True)


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"question_id": 1, "text": 5}], "line 1: found the fields question_id, text; expected question_id and text"),
        ([{"text": "x"}], "found the fields text"),
        ([{"question_id": True, "text": "x"}], "found the fields"),
        ([{"question_id": 1, "text": "x"}, {"question_id": "1", "text": "y"}], "line 2: a second answer to question 1"),
        ([{"question_id": i, "text": "x", "model_id": f"m{i}"} for i in range(2)], "several systems, m0, m1"),
    ],
)
def test_broken_answers(tmp_path, rows, words) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=words):
        read_answers(str(tmp_path / "a.jsonl"))


def test_names_of_systems(tmp_path) -> None:
    path = tmp_path / "answer_x=y-vicuna-generations-topp0.9.jsonl"
    path.write_text(json.dumps({"question_id": "q", "choices": [{"turns": ["hello"]}]}) + "\n")
    assert read_answers(str(path)) == Answers("x=y", {"q": "hello"})
    assert read_answers(f"mine={path}") == Answers("mine", {"q": "hello"})


def test_tokens_are_bytes_over_four_and_answers_as_long_as_they_may_be(tmp_path) -> None:
    prompts = read_prompts(PROMPTS["threeclass"], REVIEWERS, max_tokens=50)
    short, long = (
        compare([Question(1, "q", "")], [Answers("a", {"1": text}), Answers("b", {"1": ""})], "first")
        for text in ("", "\N{CYRILLIC SMALL LETTER DE}" * 400)
    )
    found = [estimate(each, prompts) for each in (short, long)]
    assert found[1].read - found[0].read == 200 and found[1].written == 50
    assert found[1].dollars(10, 100) == pytest.approx((found[1].read * 10 + 50 * 100) / 1e6)


def test_a_half_written_last_line_is_cut_off_and_no_other_file_is_touched(tmp_path) -> None:
    path = tmp_path / "v.jsonl"
    with VerdictFile(path) as file:
        file.append(ROW | {"text": "\ud83d and \u2028"})  # a lone surrogate, and what some take for a line's end
        with pytest.raises(InputError, match="another process"), VerdictFile(path):
            pass
    whole = path.read_bytes()
    for rest, kept in ((b'{"benchm', whole), (b"\0" * 9, whole), (json.dumps(ROW).encode(), None)):
        path.write_bytes(whole + rest)
        with VerdictFile(path) as file:
            assert file.rows[0]["text"] == "\ud83d and \u2028" and len(file.rows) == (1 if kept else 2)
        assert path.read_bytes() == (kept or whole + rest + b"\n")
    for other in (b"notes of mine", b'{"a": 1}\n', b'{"a": 1}', b"\xff\n", whole[:50] + b"\n" + whole):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"v.jsonl"), VerdictFile(path):
            pass
        assert path.read_bytes() == other


def test_every_row_is_on_the_disk_before_the_next_and_an_empty_file_does_not_stay(tmp_path, monkeypatch) -> None:
    path, synced = tmp_path / "v.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes().count(b"\n")))
    with VerdictFile(path):
        pass
    assert not path.exists()
    with VerdictFile(path) as file:
        file.append(ROW)
        file.append(ROW)
    assert synced == [1, 2]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch) -> None:
    path = tmp_path / "v.jsonl"
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return write(file, data[:40])

    with VerdictFile(path) as file:
        file.append(ROW)
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InputError, match="No space left on device"):
            file.append(ROW)
        assert path.read_bytes() == whole


def test_a_judge_that_likes_the_first_answer_shows_in_the_summary() -> None:
    scores = {("a", "b"): [[9, 5], [8, 8], [-1, -1]], ("b", "a"): [[7, 6], [8, 8], [2, 3]]}
    rows = [
        ROW | {"first": first, "second": second, "item_id": item, "score": score}
        for (first, second), judged in scores.items()
        for item, score in enumerate(judged)
    ]
    header, cells = order_table(rows)
    assert header[2:6] == ["first wins", "second wins", "ties", "unparsed"]
    assert cells == [["a", "b", "1", "0", "1", "1", "8.50", "6.50"], ["b", "a", "1", "1", "1", "0", "5.67", "5.67"]]
    bias, steady, unparsed = steadiness(rows)
    assert bias.startswith("first answer preferred: 66.7% (") and bias.endswith(
        "of 3 decided verdicts (50% without bias)"
    )
    assert steady.startswith("same verdict in both orders: 50.0%") and unparsed.startswith("unparsed: 1 of 6")
