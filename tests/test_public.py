"""Each public set is asked for as it is on the hub, and its own columns become rows of ours."""

from typing import Any

import datasets
import pytest

from lora_guard.data.example import Example
from lora_guard.data.public import PUBLIC_SETS, read_public
from lora_guard.errors import DataError
from lora_guard.taxonomy import BEAVERTAILS, Taxonomy

TAXONOMY = Taxonomy.load(BEAVERTAILS)
NO_HARM = dict.fromkeys(TAXONOMY.categories, False)

TOXICCHAT = {
    "conv_id": "c",
    "user_input": "hello",
    "model_output": "hi",
    "human_annotation": True,
    "toxicity": 1,
    "jailbreaking": 0,
    "openai_moderation": "[]",
}
WILDGUARD = {
    "prompt": "p",
    "adversarial": True,
    "response": "r",
    "prompt_harm_agreement": "three_annotator_agreement",
    "prompt_harm_label": "harmful",
    "response_refusal_agreement": "three_annotator_agreement",
    "response_refusal_label": "refusal",
    "response_harm_agreement": "three_annotator_agreement",
    "response_harm_label": "unharmful",
    "subcategory": "benign",
}
AEGIS = {
    "id": "1",
    "reconstruction_id_if_redacted": None,
    "prompt": "p",
    "response": "r",
    "prompt_label": "unsafe",
    "response_label": "safe",
    "violated_categories": "Violence",
    "prompt_label_source": "human",
    "response_label_source": "llm_jury",
}
OPENAI = {"prompt": "p", "S": 0, "H": 0, "V": 0, "HR": 0, "SH": 1, "S3": 0, "H2": 0, "V2": 0}

# Name -> rows with the columns that the set has on the hub; prompt, response, harmful, source of what becomes of them.
CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str | None, bool, str]]]] = {
    "beavertails_30k_test": (
        [{"prompt": "p", "response": "r", "category": NO_HARM | {"self_harm": True}, "is_safe": False}],
        [("p", "r", True, "beavertails_30k_test")],
    ),
    "toxicchat_test": (
        [TOXICCHAT, {**TOXICCHAT, "human_annotation": False}, {**TOXICCHAT, "toxicity": 0}],
        [("hello", None, True, "toxicchat_test"), ("hello", None, False, "toxicchat_test")],
    ),
    "openai_moderation": (
        [OPENAI, OPENAI | {"SH": 0}, OPENAI | {"SH": None, "V": 1}, OPENAI | {"SH": None}],
        [("p", None, harmful, "openai_moderation") for harmful in (True, False, True, False)],
    ),
    "xstest": (
        [
            {"id": 1, "prompt": "p", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
            {"id": 2, "prompt": "q", "type": "contrast_homonyms", "label": "unsafe", "focus": "kill", "note": ""},
        ],
        [("p", None, False, "xstest: homonyms"), ("q", None, True, "xstest: contrast_homonyms")],
    ),
    "or_bench_hard": (
        [{"prompt": "p", "category": "privacy"}],
        [("p", None, False, "or-bench-hard: privacy")],
    ),
    "or_bench_toxic": (
        [{"prompt": "p", "category": "privacy"}],
        [("p", None, True, "or-bench-toxic: privacy")],
    ),
    "harmbench": (
        [{"prompt": "p", "category": "illegal"}],
        [("p", None, True, "harmbench: illegal")],
    ),
    "wildguardtest_prompts": (
        [WILDGUARD, WILDGUARD | {"prompt_harm_label": None}, WILDGUARD | {"adversarial": False, "response": None}],
        [("p", None, True, "wildguardtest: adversarial"), ("p", None, True, "wildguardtest: vanilla")],
    ),
    "wildguardtest_responses": (
        [WILDGUARD, WILDGUARD | {"response_harm_label": None}, WILDGUARD | {"response": None}],
        [("p", "r", False, "wildguardtest: adversarial")],
    ),
    "aegis2_prompts": (
        [AEGIS, AEGIS | {"prompt": "REDACTED", "reconstruction_id_if_redacted": 7.0}],
        [("p", None, True, "aegis2_prompts")],
    ),
    "aegis2_responses": (
        [AEGIS, AEGIS | {"response": None, "response_label": None}, AEGIS | {"reconstruction_id_if_redacted": 7.0}],
        [("p", "r", False, "aegis2_responses")],
    ),
}


def shown(example: Example) -> tuple[str, str | None, bool | None, str]:
    return example.prompt, example.response, example.harmful, example.source


def test_every_public_set_has_a_case() -> None:
    assert set(CASES) == set(PUBLIC_SETS)


@pytest.mark.parametrize("name", CASES)
def test_a_sets_own_columns_become_rows_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, expected = CASES[name]
    asked: list[Any] = []

    def load_dataset(hub: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((hub, config, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [shown(example) for example in read_public(name, TAXONOMY)] == expected
    chosen = PUBLIC_SETS[name]
    assert asked == [(chosen.hub, chosen.config, chosen.split)]


def test_categories_are_kept_only_by_the_taxonomy_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = CASES["beavertails_30k_test"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    (example,) = read_public("beavertails_30k_test", TAXONOMY)
    assert [name for name, label in example.categories.items() if label] == ["self_harm"]
    (example,) = read_public("beavertails_30k_test", Taxonomy("mine", ("spam",)))
    assert not example.categories


def test_an_unknown_name_other_columns_and_no_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"public set 'xtest' is unknown.*xstest"):
        read_public("xtest", TAXONOMY)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": "a"}]))
    with pytest.raises(DataError, match=r"Paul/XSTest:1: not in the form that xstest is known by; it has text"):
        read_public("xstest", TAXONOMY)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{**WILDGUARD, "prompt_harm_label": None}])
    with pytest.raises(DataError, match="no labelled row"):
        read_public("wildguardtest_prompts", TAXONOMY)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="hub data set 'Paul/XSTest' cannot be loaded: no network"):
        read_public("xstest", TAXONOMY)
