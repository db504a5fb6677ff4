"""One labelled exchange, and how a row of any accepted form becomes one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_guard.conversation import Conversation, Target, valid_unicode
from lora_guard.errors import DataError, allowed
from lora_guard.taxonomy import Taxonomy


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, perhaps its response, and the labels of the target: the response when there is one, else the prompt.

    ``harmful`` is None and a category is absent where nobody annotated it: masked in the loss, left out of metrics.
    """

    prompt: str
    response: str | None
    harmful: bool | None
    categories: Mapping[str, bool]
    source: str

    @property
    def target(self) -> Target:
        return "prompt" if self.response is None else "response"

    def conversation(self) -> Conversation:
        return Conversation.of(self.prompt, self.response)

    def labels(self, taxonomy: Taxonomy) -> list[float]:
        """``[1 + K]``, harmfulness first: 1 harmful, 0 unharmful, nan not annotated."""
        known = [self.harmful, *(self.categories.get(category) for category in taxonomy.categories)]
        return [math.nan if label is None else float(label) for label in known]

    def row(self) -> dict[str, Any]:
        """The example in the project's form; :func:`parse_row` reads it back to an equal one."""
        return {
            "source": self.source,
            "prompt": self.prompt,
            "response": self.response,
            "unsafe": self.harmful,
            "categories": dict(self.categories),
        }


def parse_row(row: Mapping[str, Any], taxonomy: Taxonomy, where: str, source: str) -> Example:
    """Check one row.

    Accepted are the project's form ``{prompt, response?, unsafe?, categories?, source?}``, BeaverTails' on the hub
    (``is_safe``, ``category``) and the text cells of CSV files. Other keys are ignored, and all categories where the
    taxonomy has none.

    Args:
        row: the raw row.
        taxonomy: names the categories that may occur.
        where: file and line, the beginning of an error's message.
        source: recorded for rows that do not name theirs.

    Raises:
        DataError: a missing or wrongly typed field, or a category that the taxonomy lacks.
    """
    prompt, response = row.get("prompt"), row.get("response")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: field 'prompt' is {_shown(prompt)}; allowed: text")
    if not isinstance(response, str | None):
        raise DataError(f"{where}: field 'response' is {_shown(response)}; allowed: text or null")
    if "unsafe" in row:
        harmful = _label(row["unsafe"], "unsafe", where)
    else:
        safe = _label(row.get("is_safe"), "is_safe", where)
        harmful = None if safe is None else not safe
    raw = (row.get("categories", row.get("category")) or {}) if taxonomy.categories else {}
    if not isinstance(raw, Mapping):
        raise DataError(
            f"{where}: field 'categories' is {_shown(raw)}; allowed: a mapping of category to true or false"
        )
    labels = {category: _label(value, category, where) for category, value in raw.items()}
    for category in labels:
        if category not in taxonomy.categories:
            options = allowed(category, taxonomy.categories)
            raise DataError(f"{where}: taxonomy {taxonomy.name!r} has no category {category!r}; {options}")
    known = {category: label for category, label in labels.items() if label is not None}
    prompt, response = valid_unicode(prompt), None if response is None else valid_unicode(response)
    return Example(prompt, response, harmful, known, valid_unicode(str(row.get("source") or source)))


_TRUE, _FALSE, _UNKNOWN = {"true", "1", "yes"}, {"false", "0", "no"}, {"", "null", "none", "nan"}


def _label(value: Any, field: str, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, str | int) else "?"
    if word in _UNKNOWN:
        return None
    if word not in _TRUE | _FALSE:
        raise DataError(f"{where}: field {field!r} is {_shown(value)}; allowed: true, false or null")
    return word in _TRUE


def _shown(value: Any) -> str:
    """A value's type and, of a short number or null, the value: errors never quote a user's text."""
    text = f" {value!r}" if value is None or isinstance(value, int | float) else ""
    return type(value).__name__ + (text if len(text) <= 20 else "")
