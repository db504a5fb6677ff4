"""A row of any accepted form becomes one example, or one line that says where it is wrong."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.data.example import Example, parse_row
from lora_guard.data.sources import read_file
from lora_guard.errors import DataError
from lora_guard.taxonomy import Taxonomy

TAXONOMY = Taxonomy("mine", ("rude", "unfair"))
TAME = Path(__file__).parent / "data" / "tame.jsonl"

labels = st.sampled_from([True, False, None])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rude", "x\ny"]), inner, max_size=2),
    max_leaves=5,
)
fields = st.sampled_from(["prompt", "response", "unsafe", "is_safe", "categories", "category", "source", "other"])


@given(labels, st.dictionaries(st.sampled_from(TAXONOMY.categories), labels))
def test_labels_are_harmfulness_then_the_categories_and_nan_where_not_annotated(
    harmful: bool | None, categories: dict[str, bool | None]
) -> None:
    row = {"prompt": "a", "unsafe": harmful, "categories": categories}
    found = parse_row(row, TAXONOMY, "f:1", "f").labels(TAXONOMY)
    expected = [harmful, categories.get("rude"), categories.get("unfair")]
    assert len(found) == 3
    for label, wanted in zip(found, expected, strict=True):
        assert math.isnan(label) if wanted is None else label == float(wanted)


@given(labels, st.dictionaries(st.sampled_from(TAXONOMY.categories), labels))
def test_the_hubs_form_says_the_same_as_our_own(safe: bool | None, categories: dict[str, bool | None]) -> None:
    unsafe = None if safe is None else not safe
    ours = {"prompt": "a", "response": "b", "unsafe": unsafe, "categories": categories}
    hubs = {"prompt": "a", "response": "b", "is_safe": safe, "category": categories}
    assert parse_row(ours, TAXONOMY, "f:1", "f") == parse_row(hubs, TAXONOMY, "f:1", "f")


@given(
    st.builds(
        Example,
        prompt=st.text(),
        response=st.none() | st.text(),
        harmful=labels,
        categories=st.dictionaries(st.sampled_from(TAXONOMY.categories), st.booleans()),
        source=st.text(min_size=1),
    )
)
def test_an_examples_row_is_read_back_to_an_equal_example_from_a_file_too(example: Example) -> None:
    assert parse_row(example.row(), TAXONOMY, "f:1", "f") == example
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(example.row(), ensure_ascii=False) + "\n", "utf-8")
        assert read_file(path, TAXONOMY) == [example]


def test_our_own_field_is_believed_before_the_hubs() -> None:
    row = {"prompt": "a", "unsafe": True, "is_safe": True}
    assert parse_row(row, TAXONOMY, "f:1", "f").harmful is True


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        *((cell, True) for cell in (True, "true", "True", " YES ", "1", 1)),
        *((cell, False) for cell in (False, "false", "FALSE", "no", "0", 0)),
        *((cell, None) for cell in (None, "", " ", "null", "NaN")),
    ],
)
def test_label_cells_are_true_false_or_not_annotated(cell: Any, label: bool | None) -> None:
    example = parse_row({"prompt": "a", "unsafe": cell, "categories": {"rude": cell}}, TAXONOMY, "f:1", "f")
    assert example.harmful is label
    assert example.categories.get("rude") is label


@given(st.dictionaries(fields, json_values))
def test_any_row_is_an_example_or_one_line_that_begins_with_its_place(row: dict[str, Any]) -> None:
    message = ""
    try:
        example = parse_row(row, TAXONOMY, "rows.jsonl:12", "rows")
        assert len(example.labels(TAXONOMY)) == 3
        assert set(example.categories) <= set(TAXONOMY.categories)
        assert example.conversation().target == example.target
    except DataError as error:
        message = str(error)
    assert not message or message.startswith("rows.jsonl:12: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ["my secret words"]},
        {"prompt": "a", "response": {"text": "my secret words"}},
        {"prompt": "a", "unsafe": "my secret words"},
        {"prompt": "a", "categories": "my secret words"},
    ],
)
def test_no_error_quotes_a_users_text(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row, TAXONOMY, "f:1", "f")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("response", "roles"), [(None, ["user"]), ("", ["user", "assistant"])])
def test_an_empty_response_is_one_and_an_absent_one_is_not(response: str | None, roles: list[str]) -> None:
    example = Example("a", response, True, {}, "f")
    assert [message.role for message in example.conversation().messages] == roles
    assert example.conversation().target == example.target


def test_the_tame_rows_hold_every_kind_of_row() -> None:
    examples = read_file(TAME, Taxonomy.load("beavertails"))
    assert {example.target for example in examples} == {"prompt", "response"}
    assert {example.harmful for example in examples} == {True, False, None}
    assert {len(example.categories) for example in examples} >= {0, 1, 14}
    answers: dict[str, set[str | None]] = {}
    for example in examples:
        answers.setdefault(example.prompt, set()).add(example.response)
    assert sum(len(found) > 1 for found in answers.values()) >= 10
