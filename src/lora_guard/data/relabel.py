"""Labels that a source's settings add to its rows' own: categories in other words, prompts all of one kind."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_guard.config import Source
from lora_guard.data.example import Example
from lora_guard.errors import DataError, allowed
from lora_guard.taxonomy import Taxonomy


def check_names(source: Source, taxonomy: Taxonomy) -> None:
    """Check that ``category_names`` leads to categories of the taxonomy.

    Raises:
        DataError: it names another.
    """
    for word, names in source.category_names.items():
        for name in names:
            if name not in taxonomy.categories:
                options = allowed(name, taxonomy.categories)
                raise DataError(f"{source.path}: category_names has {word!r} for {name!r}; {options}")


def relabel(example: Example, row: Mapping[str, Any], source: Source, taxonomy: Taxonomy, where: str) -> Example:
    """An example as its source's settings have it.

    Args:
        example: by the row's own labels, which stay where the settings say nothing.
        row: the raw row.
        source: its ``prompts_are``, ``category_column``, ``category_names`` and ``names_every_category``.
        taxonomy: names the categories.
        where: file and line, the beginning of an error's message.

    Raises:
        DataError: the category column holds neither text nor a list of texts.
    """
    if source.prompts_are is not None:
        harmful = source.prompts_are == "harmful"
        unharmful = {} if harmful else dict.fromkeys(taxonomy.categories, False)
        example = replace(example, response=None, harmful=harmful, categories=unharmful)
    if source.category_column is None or example.harmful is False:
        return example
    named = _named(row.get(source.category_column), source, taxonomy, where)
    others = dict.fromkeys(taxonomy.categories, False) if source.names_every_category else {}
    return replace(example, categories={**others, **dict.fromkeys(named, True), **example.categories})


def _named(value: Any, source: Source, taxonomy: Taxonomy, where: str) -> list[str]:
    words = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: field {source.category_column!r} is {type(value).__name__}; allowed: text or a list")
    own = {name: [name] for name in taxonomy.categories}
    return [name for word in words for name in source.category_names.get(word, own.get(word, []))]
