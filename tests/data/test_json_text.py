"""Rows of JSON texts: the same as json.loads gives, each with the line where it begins."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.json_text import json_rows, jsonl_rows
from qlora_jax.errors import InputError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=5)


@given(OBJECTS, st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_a_list_reads_as_json_reads_it(objects, indent, ascii_only):
    text = json.dumps(objects, indent=indent, ensure_ascii=ascii_only)
    assert [row.fields for row in json_rows("f", text)] == objects


@given(OBJECTS, st.booleans())
def test_one_object_a_line_reads_under_either_name(objects, ascii_only):
    text = "\n".join(json.dumps(each, ensure_ascii=ascii_only) for each in objects) + "\n"
    assert [row.fields for row in jsonl_rows("f", text)] == objects
    if not any("data" in each for each in objects):
        assert [row.fields for row in json_rows("f", text)] == objects


def test_rows_know_their_lines():
    text = '[\n  {"a": 1},\n  {"a":\n   2}, {"a": 3},\n\n  {"a": 4}\n]\n'
    assert [row.number for row in json_rows("f", text)] == [2, 3, 4, 6]
    assert json_rows("f", text)[3].where == "f, line 6"
    assert [row.number for row in jsonl_rows("f", '{"a": 1}\n\n{"a": 2}\n')] == [1, 3]


def test_data_key():
    text = '{"version": {"data": []},\n "data": [\n{"a": 1},\n{"a": 2}], "after": [1]}'
    rows = json_rows("f", text)
    assert [(row.number, row.fields) for row in rows] == [(3, {"a": 1}), (4, {"a": 2})]


def test_a_single_object_is_one_row():
    assert [row.fields for row in json_rows("f", '{"a": 1,\n "b": 2}')] == [{"a": 1, "b": 2}]


def test_line_separators_inside_strings_do_not_end_a_line():
    assert [row.fields for row in jsonl_rows("f", '{"a": "x\u2028y\x85z"}\r\n{"a": "w"}')] == [
        {"a": "x\u2028y\x85z"},
        {"a": "w"},
    ]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', 3, "not valid JSON: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "expected ',' or ']'"),
        ('[\n{"a": 1},\n', 3, "not valid JSON"),
        ('[\n{"a": 1}', 2, "the end of the file"),
        ('[\n{"a": 1},\n7]', 3, "expected an object, found a number"),
        ('[\n{"a": 1}\n]\n]', 4, "text after the end"),
        ('"text"', 1, "expected a list of objects"),
        ('{"a": 1,\n"b": 2}\n{"a": 3}', 3, "text after the end"),
        ('{"a": 1}\n{"a" 2}\n', 2, "not valid JSON"),
        ('{"a": 1}\n[1]\n', 2, "expected an object, found a list"),
        ("[{" + '"a":' + "9" * 5000 + "}]", 1, "not valid JSON"),
        ('[{"a": 1},\n{"b": 1, "b": 2}]', 2, "the key 'b' stands twice in one object"),
        ('{"a": 1}\n{"b": {"c": 1, "c": 1}}', 2, "the key 'c' stands twice in one object"),
        ('{"data": [{"a": 1}],\n"data": []}', 2, "the key 'data' stands twice in one object"),
        ('{"x": 1, "x": 2,\n"data": [{"a": 1}]}', 1, "the key 'x' stands twice in one object"),
    ],
)
def test_errors_name_line_and_reason(text, line, reason):
    with pytest.raises(InputError) as caught:
        json_rows("f.json", text)
    assert str(caught.value).startswith(f"f.json, line {line}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_an_input_error():
    with pytest.raises(InputError, match="nested too deeply"):
        json_rows("f", "[" * 200_000)


def test_the_first_bad_line_is_named_and_the_others_counted():
    with pytest.raises(InputError, match=r"^f, line 2: .*\(and 2 more bad rows in this data set\)$"):
        jsonl_rows("f", '{"a": 1}\n{"a": \nnull\n{"b": 1}\n"x"\n')
