"""Taxonomies: the built-in one, a user's own from a file, and what is wrong with a bad one."""

import json
from pathlib import Path

import pytest

from lora_guard import Taxonomy
from lora_guard.errors import ConfigError


def test_the_built_in_taxonomy_has_the_14_categories_of_beavertails() -> None:
    taxonomy = Taxonomy.load("beavertails")
    assert len(taxonomy.categories) == 14
    assert list(taxonomy.categories) == sorted(taxonomy.categories)


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
        ("name: mine\ncategories: []\n", "has no categories"),
        ("name: mine\ncategories: [a, a]\n", "repeats category 'a'"),
        ("name: mine\ncategories: [a, '']\n", "has category ''"),
        ("name: mine\ncategories: [a, 3]\n", "has category 3"),
        ("categories: [a]\n", "exactly 'name'"),
        ("[a]", "exactly 'name'"),
        ("a: [", "while parsing"),
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


def test_an_unknown_name_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="'beavertail' not found; allowed: 'beavertails' or a YAML or JSON file"):
        Taxonomy.load("beavertail")
