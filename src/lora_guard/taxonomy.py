"""Harm categories: the built-in BeaverTails set, none at all, or a user's own, read from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from lora_guard.errors import ConfigError, allowed


@dataclass(frozen=True)
class Taxonomy:
    """An ordered set of harm categories; the order is the order of the head's category outputs.

    A guard of a taxonomy without categories scores harmfulness alone.

    Raises:
        ConfigError: a repeated category, or a name that is not a non-empty string.
    """

    name: str
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        bad = [c for c in self.categories if not isinstance(c, str) or not c.strip()]
        if bad:
            raise ConfigError(f"taxonomy {self.name!r} has category {bad[0]!r}; allowed: non-empty strings")
        repeated = sorted({c for c in self.categories if self.categories.count(c) > 1})
        if repeated:
            raise ConfigError(f"taxonomy {self.name!r} repeats category {repeated[0]!r}; allowed: each once")

    def index(self, category: str) -> int:
        """The category's place among the head's category outputs.

        Raises:
            ConfigError: the taxonomy lacks it.
        """
        try:
            return self.categories.index(category)
        except ValueError:
            raise ConfigError(
                f"taxonomy {self.name!r} has no category {category!r}; {allowed(category, self.categories)}"
            ) from None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """A built-in taxonomy by name, or a YAML or JSON file ``{name: …, categories: [a, b, …]}``.

        Raises:
            ConfigError: an unknown name, an unreadable file or one of another form.
        """
        if str(name_or_path) in BUILT_IN:
            return cls(str(name_or_path), BUILT_IN[str(name_or_path)])
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(
                f"taxonomy {str(name_or_path)!r} not found; "
                f"allowed: {', '.join(map(repr, BUILT_IN))} or a YAML or JSON file"
            )
        try:
            return cls.from_dict(yaml.safe_load(path.read_text("utf-8")))
        except (yaml.YAMLError, ValueError, ConfigError) as error:  # ValueError: not UTF-8, or an impossible date
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: another form than ``{name, categories}``.
        """
        if (
            not isinstance(raw, Mapping)
            or set(raw) != {"name", "categories"}
            or not isinstance(raw["categories"], list)
        ):
            raise ConfigError("a taxonomy is a mapping of exactly 'name' (text) and 'categories' (a list of names)")
        return cls(str(raw["name"]), tuple(raw["categories"]))

    def to_dict(self) -> dict[str, Any]:
        """The form saved in a guard and read from a taxonomy file."""
        return {"name": self.name, "categories": list(self.categories)}


BEAVERTAILS = "beavertails"

# The 14 category keys of the BeaverTails data set (arXiv 2307.04657), alphabetical as the data set has them.
_BEAVERTAILS_CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)

BUILT_IN: Mapping[str, tuple[str, ...]] = {BEAVERTAILS: _BEAVERTAILS_CATEGORIES, "harmfulness": ()}

OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""The category keys of OpenAI's moderation endpoint, which its clients expect."""

# The BeaverTails categories that speak for a key; the highest of their scores is the key's. BeaverTails does not part
# threats, intent, instructions and graphic depiction from the rest, so nothing speaks for those keys.
_BEAVERTAILS_FOR_OPENAI = {
    "harassment": ("hate_speech,offensive_language",),
    "hate": ("discrimination,stereotype,injustice", "hate_speech,offensive_language"),
    "illicit": ("drug_abuse,weapons,banned_substance", "financial_crime,property_crime,theft"),
    "illicit/violent": ("terrorism,organized_crime",),
    "self-harm": ("self_harm",),
    "sexual": ("sexually_explicit,adult_content",),
    "sexual/minors": ("child_abuse",),
    "violence": ("terrorism,organized_crime", "violence,aiding_and_abetting,incitement"),
}


def openai_sources(taxonomy: Taxonomy) -> dict[str, tuple[str, ...]]:
    """For each OpenAI category key the categories of the taxonomy that speak for it; none where it has none.

    A category named as the key speaks for it alone; otherwise the built-in table decides.
    """
    return {
        key: (key,)
        if key in taxonomy.categories
        else tuple(name for name in _BEAVERTAILS_FOR_OPENAI.get(key, ()) if name in taxonomy.categories)
        for key in OPENAI_CATEGORIES
    }
