"""Taxonomies: the built-in one, a user's own from a file, and what is wrong with a bad one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard import Taxonomy
from lora_guard.errors import ConfigError
from lora_guard.taxonomy import BEAVERTAILS, OPENAI_CATEGORIES, openai_sources


def test_the_built_in_taxonomy_has_the_14_categories_of_beavertails() -> None:
    taxonomy = Taxonomy.load("beavertails")
    assert len(taxonomy.categories) == 14
    assert list(taxonomy.categories) == sorted(taxonomy.categories)


@given(st.text(), st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=9, unique=True))
def test_a_taxonomy_survives_a_save_and_keeps_its_order(name: str, categories: list[str]) -> None:
    taxonomy = Taxonomy(name, tuple(categories))
    assert Taxonomy.from_dict(json.loads(json.dumps(taxonomy.to_dict()))) == taxonomy
    assert [taxonomy.index(category) for category in categories] == list(range(len(categories)))


@pytest.mark.parametrize(
    "text", ["name: mine\ncategories: [spam, insults]\n", '{"name": "mine", "categories": ["spam", "insults"]}']
)
def test_a_users_own_is_read_from_yaml_or_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "taxonomy"
    path.write_text(text, "utf-8")
    taxonomy = Taxonomy.load(path)
    assert taxonomy == Taxonomy("mine", ("spam", "insults"))
    assert Taxonomy.from_dict(json.loads(json.dumps(taxonomy.to_dict()))) == taxonomy
    assert taxonomy.index("insults") == 1
    with pytest.raises(ConfigError, match="has no category 'insult'; did you mean 'insults'"):
        taxonomy.index("insult")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\ncategories: [a, a]\n", "repeats category 'a'"),
        ("name: mine\ncategories: [a, '']\n", "has category ''"),
        ("name: mine\ncategories: [a, 3]\n", "has category 3"),
        ("categories: [a]\n", "exactly 'name'"),
        ("[a]", "exactly 'name'"),
        ("a: [", "while parsing"),
        ("name: mine\ncategories: a\n", "exactly 'name'"),
        ("name: mine\ncategories: [a]\nmore: 1\n", "exactly 'name'"),
        ("name: 2026-02-30\ncategories: [a]\n", "out of range"),
        ("", "exactly 'name'"),
    ],
)
def test_a_bad_taxonomy_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        Taxonomy.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"taxonomy.yaml: 'utf-8' codec can't decode"):
        Taxonomy.load(path)


def test_an_unknown_name_says_what_is_allowed() -> None:
    options = "'beavertails', 'harmfulness' or a YAML or JSON file"
    with pytest.raises(ConfigError, match=f"'beavertail' not found; allowed: {options}"):
        Taxonomy.load("beavertail")


def test_a_taxonomy_may_be_of_harmfulness_alone(tmp_path: Path) -> None:
    assert Taxonomy.load("harmfulness").categories == ()
    (tmp_path / "mine.yaml").write_text("name: mine\ncategories: []\n", "utf-8")
    assert Taxonomy.load(tmp_path / "mine.yaml") == Taxonomy("mine", ())


def test_openais_keys_are_mapped_to_categories_that_exist() -> None:
    beavertails = Taxonomy.load(BEAVERTAILS)
    sources = openai_sources(beavertails)
    assert tuple(sources) == OPENAI_CATEGORIES
    assert sources["violence"] == ("terrorism,organized_crime", "violence,aiding_and_abetting,incitement")
    assert sources["violence/graphic"] == ()
    named = {name for names in sources.values() for name in names}
    assert named <= set(beavertails.categories)


def test_a_category_named_as_openais_key_speaks_for_it_alone() -> None:
    sources = openai_sources(Taxonomy("own", ("violence", "self_harm", "other")))
    assert sources["violence"] == ("violence",)
    assert sources["self-harm"] == ("self_harm",)
    assert sources["hate"] == ()
