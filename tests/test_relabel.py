"""Relabelling: a source's settings add labels, and never take away one that a row has of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.config import Source, TrainConfig
from lora_guard.data.example import Example
from lora_guard.data.relabel import relabel
from lora_guard.data.sources import read
from lora_guard.errors import ConfigError, DataError
from lora_guard.taxonomy import Taxonomy

TAXONOMY = Taxonomy("garden", ("weeds", "slugs", "frost"))


def source(**settings: Any) -> Source:
    return Source(path="rows.jsonl", **settings)


def example(harmful: bool | None = True, response: str | None = "It rains.", **labels: bool) -> Example:
    return Example("How is the garden?", response, harmful, labels, "test")


def relabelled(row: Mapping[str, Any], settings: Source, before: Example) -> Example:
    return relabel(before, row, settings, TAXONOMY, "rows.jsonl:1")


@pytest.mark.parametrize("value", ["snails", ["snails"], ["snails", "a word nobody knows"]])
def test_words_of_another_taxonomy_become_our_categories(value: object) -> None:
    settings = source(category_column="kind", category_names={"snails": ["slugs"]})
    assert relabelled({"kind": value}, settings, example()).categories == {"slugs": True}


def test_a_word_that_is_our_category_needs_no_entry() -> None:
    assert relabelled({"kind": "frost"}, source(category_column="kind"), example()).categories == {"frost": True}


def test_categories_that_are_not_named_are_absent_only_where_every_one_is_named() -> None:
    settings = source(category_column="kind", names_every_category=True)
    found = relabelled({"kind": ["frost"]}, settings, example(harmful=None))
    assert found.categories == {"weeds": False, "slugs": False, "frost": True}


@given(st.dictionaries(st.sampled_from(TAXONOMY.categories), st.booleans()), st.lists(st.sampled_from("abc")))
def test_a_rows_own_labels_stay(own: dict[str, bool], words: list[str]) -> None:
    names = {"a": ["weeds"], "b": ["slugs", "frost"]}
    settings = source(category_column="kind", category_names=names, names_every_category=True)
    found = relabelled({"kind": words}, settings, example(**own))
    assert {name: found.categories[name] for name in own} == own


def test_a_harmless_row_gets_no_category_from_the_column() -> None:
    assert relabelled({"kind": "frost"}, source(category_column="kind"), example(harmful=False)).categories == {}


@pytest.mark.parametrize(("kind", "labels"), [("harmful", {}), ("harmless", dict.fromkeys(TAXONOMY.categories, False))])
def test_prompts_are_read_alone_with_one_label(kind: str, labels: dict[str, bool]) -> None:
    found = relabelled({}, source(prompts_are=kind), example(harmful=None, weeds=True))
    assert (found.response, found.harmful, found.categories) == (None, kind == "harmful", labels)
    assert found.target == "prompt"


def test_each_prompt_is_read_once_and_rows_are_drawn_among_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number % 3}?", "response": str(number), "unsafe": False} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Source(path=str(tmp_path / "rows.jsonl"), prompts_are="harmful")
    assert [e.prompt for e in read(settings, TAXONOMY)] == ["Question 0?", "Question 1?", "Question 2?"]
    assert len(read(settings.model_copy(update={"rows": 2}), TAXONOMY)) == 2


def test_a_column_that_holds_no_text_is_named_with_its_place() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: field 'kind' is int; allowed: text or a list"):
        relabelled({"kind": 7}, source(category_column="kind"), example())


def test_a_category_that_the_taxonomy_lacks_is_refused_with_the_nearest() -> None:
    settings = source(category_column="kind", category_names={"snails": ["slug"]})
    with pytest.raises(DataError, match=r"category_names has 'snails' for 'slug'.*slugs"):
        read(settings, TAXONOMY)


def test_names_without_a_column_are_refused() -> None:
    with pytest.raises(ConfigError, match="category_names and names_every_category need category_column"):
        TrainConfig.load(None, ["train=[{path: a.jsonl, names_every_category: true}]"])
