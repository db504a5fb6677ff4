"""The report is one page without script or outside resource, with well-formed figures, and hides harmful text."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lora_guard.data.example import Example
from lora_guard.evaluation.metrics import evaluate
from lora_guard.evaluation.page import to_html
from lora_guard.evaluation.scores import Scored
from lora_guard.evaluation.sets import EvalSet
from lora_guard.evaluation.slices import slices

HOSTILE = "<script>alert('prompt')</script> & \x1b[2J"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Structure(HTMLParser):
    """Which elements there are, what each holds hidden, and whether they close in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.hidden: list[str] = []
        self.shown: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.hidden if "details" in self.open and "summary" not in self.open else self.shown).append(data)


def scored(name: str = "mine", rows: int = 40, harmful: float | None = None) -> Scored:
    random = np.random.default_rng(0)
    labels = np.column_stack([np.arange(rows) % 2, np.arange(rows) % 4 == 0]).astype(float)
    if harmful is not None:
        labels[:] = harmful
    scores = np.clip(0.4 + 0.2 * labels + random.normal(0, 0.25, labels.shape), 0, 1)
    examples = [Example(f"{HOSTILE} {row}", "fine" if row % 3 else None, None, {}, "s") for row in range(rows)]
    half = np.full_like(scores, 0.5)
    return Scored(
        EvalSet(name, f"{name}.jsonl", "0" * 64, examples),
        scores,
        scores**2,
        scores,
        half,
        labels,
        {"saved": scores[:, 0] >= 0.5},
    )


def results_of(parts: list[Scored], **more: Any) -> dict[str, Any]:
    datasets = {}
    for part in parts:
        metrics = evaluate(
            part.scores, part.labels, part.thresholds, ["<b>"], uncalibrated=part.uncalibrated, resamples=10
        )
        control = {
            "title": "a <simple> control",
            "config": "c",
            "command": "train",
            "commit": "1" * 40,
            "parameters": 10,
            "harmfulness": metrics["harmfulness"],
            "comparison": {"auprc": "below", "f1": "not distinguishable"},
        }
        counts = {"true_positives": 9, "false_negatives": 1, "false_positives": 2, "true_negatives": 8}
        datasets[part.data.name] = {
            **metrics,
            "slices": slices(part, ("<b>",), resamples=10, seed=0),
            "confusion": {"saved": counts} if metrics["harmfulness"] else {},
            "controls": [control] if metrics["harmfulness"] else [],
            "published": [{"system": "Other 7B", "parameters": 7e9, "metric": "f1", "value": 0.8, "note": "n"}],
            **more,
        }
    provenance = {
        "left_out": {},
        "guard": "<guard>",
        "policy": "saved",
        "parameters": 1000,
        "base": {"name": "base"},
        "data": {part.data.name: {"file": part.data.place, "sha256": part.data.sha256} for part in parts},
        "bootstrap": {"resamples": 10},
        "commit": "2" * 40,
        "lora-guard": "1",
    }
    return {"datasets": datasets, "provenance": provenance}


def page_of(parts: list[Scored], *, text: bool = True, **more: Any) -> str:
    return to_html(results_of(parts, **more), parts, text=text)


@pytest.fixture(scope="module")
def page() -> str:
    return page_of([scored(), scored("other")])


def test_elements_close_in_order_and_the_contents_lead_somewhere(page: str) -> None:
    structure = Structure(page)
    assert not structure.open
    ids = [attributes["id"] for _, attributes in structure.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {value for _, attributes in structure.tags for name in ("href",) if (value := attributes.get(name))}
    assert {link[1:] for link in links} <= set(ids)
    assert {"#summary", "#set-1", "#set-2", "#reading", "#provenance"} <= links


def test_a_page_without_others_names_none() -> None:
    alone = page_of([scored()], controls=[], published=[])
    assert not re.search(r"Beside others|and the controls|that others published\.", alone)
    assert "policies." in alone


def test_what_was_not_recorded_is_left_out_of_the_provenance() -> None:
    results = results_of([scored()])
    results["provenance"]["rows_per_second"] = {"mine": None}
    assert "rows_per_second" not in to_html(results, [scored()], text=True)


def test_the_page_has_no_script_and_fetches_nothing(page: str) -> None:
    structure = Structure(page)
    assert {"script", "link", "iframe", "img"}.isdisjoint(tag for tag, _ in structure.tags)
    for _, attributes in structure.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_what_a_prompt_or_name_says_is_text_and_hidden_until_clicked(page: str) -> None:
    structure = Structure(page)
    assert "alert" in "".join(structure.hidden)
    assert "alert" not in "".join(structure.shown)
    assert "<guard>" in "".join(structure.shown)
    assert "a <simple> control" in "".join(structure.shown)


def test_without_text_no_row_is_quoted_anywhere() -> None:
    without = page_of([scored()], text=False)
    assert "alert" not in without
    assert "Worst errors" not in without


def test_the_worst_errors_are_the_furthest_on_the_wrong_side(page: str) -> None:
    part = scored()
    wrong = [row for row in range(40) if part.labels[row, 0] == 0 and part.scores[row, 0] >= 0.5]
    worst = max(wrong, key=lambda row: part.scores[row, 0])
    first = page.index("Unharmful, scored highest")
    assert f"row {worst + 1}," in page[first : first + 200]


def test_a_figure_is_whole_and_takes_the_pages_colour(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "currentColor" in figure
        assert "#010203" not in figure


def test_controls_and_published_figures_are_marked_for_what_they_are(page: str) -> None:
    assert "measured, control" in page
    assert re.search(r"Other 7B\s*<span class=\"tag\">published", page)
    assert re.search(r"saved\s*<span class=\"tag\">used above", page)
    assert "does not beat every control" in page


@pytest.mark.parametrize("harmful", [0.0, 1.0, np.nan])
def test_a_set_of_one_class_or_none_has_a_page(harmful: float) -> None:
    structure = Structure(page_of([scored(harmful=harmful)]))
    assert not structure.open


def test_disguised_texts_stand_below_the_set_as_it_is_with_what_misses_its_goal() -> None:
    part = scored()
    metric = {"value": 0.4, "low": 0.3, "high": 0.5}
    named = {name: metric for name in ("auprc", "recall", "f1", "fpr", "drop")}
    changes = {"leet": {**named, "goal": 0.05, "met": False}, "base64": {**named, "goal": None, "met": None}}
    with_changes = page_of([part], perturbations=changes)
    table = with_changes[with_changes.index("Disguised texts") :]
    assert re.search(r"<td>leet</td>.*≤ 0.05, <b>not met</b>", table)
    assert re.search(r"<td>base64</td>.*<td>–</td></tr>", table)
    assert "Disguised texts" not in page_of([part])


def test_the_template_is_part_of_the_package() -> None:
    import lora_guard.evaluation

    assert (Path(lora_guard.evaluation.__file__).parent / "report.html.j2").is_file()
