"""The model card: what a guard was made of and how well it does, with nothing left blank."""

from typing import Any

import yaml
from guards import plain_calibration

from lora_guard.artifact import BaseReference, DataReference, GuardSpec, HeadsShape
from lora_guard.training.card import model_card, with_calibration

SETS = {
    "validation": {"auprc": 0.91234, "f1": 0.8},
    "held": {"auprc": None, "auroc": 0.75, "precision": 1.0, "recall": 0.5, "f1": 0.6, "fpr": 0.0, "accuracy": 0.9},
}


def spec(**fields: Any) -> GuardSpec:
    values: dict[str, Any] = {
        "name": "mine",
        "adapter": "lora",
        "base": BaseReference(name="some/model", revision="abc", fingerprint="sha256:1", hidden_size=8, note="a note"),
        "taxonomy": {"name": "own", "categories": ["rude", "unfair"]},
        "invocation": "",
        "max_length": 256,
        "heads": HeadsShape(bias=True, harmful=True),
        "calibration": plain_calibration([], 0.321, strict=0.1),
        "data": [DataReference(name="rows", rows=12_345, licence="MIT"), DataReference(name="x", rows=1, licence=None)],
        "licence": "cc-by-nc-4.0",
        "metrics": {"epoch": 2, "sets": SETS},
        "provenance": {"python": "3.11", "torch": "2", "transformers": "5", "peft": "0.21"},
    }
    return GuardSpec(**values | fields)


def table(card: str, heading: str) -> list[list[str]]:
    """The rows of the first table behind a heading."""
    lines = card.split(heading, 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_front_matter_is_yaml_that_names_base_and_licence() -> None:
    _, front, _ = model_card(spec()).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lora-guard",
        "base_model": "some/model",
        "tags": ["content-moderation", "lora", "guardrail"],
        "license": "cc-by-nc-4.0",
    }


def test_what_the_hub_has_no_identifier_for_is_given_by_its_name() -> None:
    local = spec().base.model_copy(update={"name": "local"})
    _, front, _ = model_card(spec(licence="CC BY-NC 4.0 and more", base=local)).split("---\n", 2)
    found = yaml.safe_load(front)
    assert (found["license"], found["license_name"]) == ("other", "CC BY-NC 4.0 and more")
    assert "base_model" not in found


def test_a_card_says_on_what_the_guard_stands_and_what_it_tells() -> None:
    facts = {row[0]: row[1] for row in table(model_card(spec()), "# mine") if len(row) == 2}
    assert facts["Base model"] == "some/model at abc"
    assert facts["The base is"] == "a note"
    assert facts["Base weights"] == "`sha256:1`"
    assert facts["Taxonomy"] == "own: rude; unfair"
    assert facts["Window"].startswith("256 tokens")
    assert facts["Licence of these weights"] == "cc-by-nc-4.0"


def test_every_source_stands_there_with_its_rows_and_licence() -> None:
    assert table(model_card(spec()), "## Training data")[2:] == [["rows", "12,345", "MIT"], ["x", "1", "not stated"]]


def test_every_set_has_its_metrics_and_a_dash_where_one_is_undefined() -> None:
    header, _, *rows = table(model_card(spec()), "## Metrics")
    found = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert found["validation"]["AUPRC"] == "0.912"
    assert found["validation"]["FPR"] == "–"
    assert found["held"] == {
        "AUPRC": "–", "AUROC": "0.750", "precision": "1.000", "recall": "0.500", "F1": "0.600", "FPR": "0.000",
        "accuracy": "0.900",
    }  # fmt: skip


def test_the_thresholds_of_every_policy_stand_there_with_the_rows_they_come_from() -> None:
    card = model_card(spec())
    assert table(card, "## Calibration")[2:] == [
        ["balanced (default)", "best F1", "0.321", "0.321"],
        ["strict", "best F1", "0.100", "0.100"],
    ]
    assert "the validation rows of the run." in card
    assert "`guard.json` has on how many rows each stands." in card
    assert "those of the categories, and" in model_card(spec(calibration=plain_calibration(["rude"])))


def test_a_new_calibration_replaces_its_section_and_nothing_else() -> None:
    record = {"rows": 1234, "data": [{"file": "a.jsonl"}, {"file": "b.csv"}], "ece": {"held_out": 0.0214}}
    changed = spec(calibration=plain_calibration([], 0.7), provenance={**spec().provenance, "calibration": record})
    card = with_calibration(model_card(spec()), changed)
    assert card == model_card(changed)
    assert "1,234 rows of `a.jsonl`, `b.csv`. The calibration error" in card
    assert "did not see is 0.021." in card
    assert with_calibration(card, changed) == card
    by_hand = with_calibration("# Mine\n\nText.\n", changed)
    assert by_hand.startswith("# Mine\n\nText.\n\n## Calibration\n")
    assert with_calibration(by_hand, changed) == by_hand


def test_what_is_not_known_is_said_to_be_not_stated() -> None:
    base = BaseReference(name="some/model", revision=None, fingerprint="sha256:1", hidden_size=8)
    card = model_card(spec(data=[], licence=None, base=base))
    assert "license" not in card.split("---\n", 2)[1]
    assert "Not stated." in card
    facts = {row[0]: row[1] for row in table(card, "# mine") if len(row) == 2}
    assert facts["Base model"] == "some/model"
    assert facts["Licence of these weights"] == "not stated"
    assert "The base is" not in facts


def test_a_guard_without_adapter_says_so() -> None:
    assert "low-rank adapters and linear heads" in model_card(spec())
    card = model_card(spec(adapter="none"))
    assert "linear heads on frozen features" in card
    assert "low-rank adapters" not in card
