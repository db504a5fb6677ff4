"""The model card that every guard folder carries as its README."""

# ruff: noqa: E501  (Markdown tables)

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lora_guard import files
from lora_guard.artifact import CARD_FILE, GuardSpec
from lora_guard.evaluation.metrics import shown
from lora_guard.evaluation.report import verdict_on_controls
from lora_guard.guard import find

_TEMPLATE = """\
---
library_name: lora-guard
{%- if "/" in spec.base.name %}
base_model: {{ spec.base.name }}
{%- endif %}
tags: [content-moderation, lora, guardrail]
{%- if spec.licence and spec.licence | lower in hub_licences %}
license: {{ spec.licence | lower }}
{%- elif spec.licence %}
license: other
license_name: {{ spec.licence }}
{%- endif %}
---

# {{ spec.name }}

A [LoRA-Guard](https://arxiv.org/abs/2407.02987) guard: {{ adapter }} for one frozen chat
model. It scores how harmful a prompt or a response is, {{ "and %d categories of harm" % categories | length if categories else "and no categories of harm" }}. It is no chat model and
does not change the one it stands beside.

| | |
|---|---|
| Base model | {{ spec.base.name }}{% if spec.base.revision %} at {{ spec.base.revision }}{% endif %} |
{%- if spec.base.note %}
| The base is | {{ spec.base.note }} |
{%- endif %}
| Base weights | `{{ spec.base.fingerprint }}` |
| Taxonomy | {{ spec.taxonomy.name }}{{ ": " if categories }}{{ categories | join("; ") }} |
| Window | {{ spec.max_length }} tokens; longer text is scored in overlapping windows |
| Licence of these weights | {{ spec.licence or "not stated" }} |

## Training data
{% if spec.data %}
| source | rows | licence |
|---|---|---|
{%- for part in spec.data %}
| {{ part.name }} | {{ "{:,}".format(part.rows) }} | {{ part.licence or "not stated" }} |
{%- endfor %}
{% else %}
Not stated.
{% endif %}
{%- if spec.metrics %}
## Metrics of the training

Harmfulness after epoch {{ spec.metrics.epoch }}, at threshold 0.5, before calibration.

| set | AUPRC | AUROC | precision | recall | F1 | FPR | accuracy |
|---|---|---|---|---|---|---|---|
{%- for name, metrics in spec.metrics.sets.items() %}
| {{ name }} |{% for key in ["auprc", "auroc", "precision", "recall", "f1", "fpr", "accuracy"] %} {{ figure(metrics.get(key)) }} |{% endfor %}
{%- endfor %}
{% endif %}
{{ calibration }}
## Evaluation

Not evaluated: `lora-guard eval --card` puts its figures here.

{% if spec.provenance.config is defined -%}
## How it was made

    lora-guard train RUN --config config.yaml --set data_root=DATA

`config.yaml` is what `guard.json` holds under `provenance.config`, and DATA the folder of the files it names. Python {{ spec.provenance.python }}, torch {{ spec.provenance.torch }},
transformers {{ spec.provenance.transformers }}, peft {{ spec.provenance.peft }}.
{%- if spec.provenance.start_from is defined %}
`start_from` there was the guard {{ spec.provenance.start_from.name }} whose files have the sha256 under `provenance.start_from`; a newer one may have taken its name since.
{%- endif %}
{%- if spec.provenance.average_of is defined %}
Its adapter and heads are the mean of those of {{ spec.provenance.average_of | length }} guards, the first of which was made so (`examples/average_guards.py`); the sha256 of
their files are under `provenance.average_of`.
{%- endif %}

{% endif -%}
## Limits

A score is an estimate, not a ruling: it is wrong on some text, more often on text unlike the training data, and it says
nothing of whether a statement is true. Judge the thresholds on your own data before you block anything by them.
"""


_CALIBRATION = """\
## Calibration

A score is the estimated probability of harm on text like the rows it was calibrated on:
{%- if record %} {{ "{:,}".format(record.rows) }} rows of {% for part in record.data %}{{ ", " if not loop.first }}`{{ part.file }}`{% endfor %}.
{%- if record.ece.held_out is not none %} The calibration error (ECE) of harmfulness on the half of the prompts that a fit did not see is {{ "%.3f" | format(record.ece.held_out) }}.{% endif %}
{%- else %} the validation rows of the run.{% endif %}
{%- if tokens %}
Beside the adapter, a weight for each token of the vocabulary has a part in a prompt's score, learned from
{{ "{:,}".format(tokens.texts) }} texts of {{ tokens.sources | join(", ") }}: single words count there, whatever is said of them.
{%- endif %}
A text is flagged from its policy's threshold on; those of harmfulness:

| policy | chosen by | prompt | response |
|---|---|---|---|
{%- for name, policy in calibration.policies.items() %}
| {{ name }}{{ " (default)" if name == calibration.default_policy }} | {{ policy }} |
{%- for target in ["prompt", "response"] %} {{ "%.3f" | format(calibration.of(target).harmful.thresholds[name]) }} |{% endfor %}
{%- endfor %}

{% for target in ["prompt", "response"] if calibration.of(target).harmful_share -%}
Best F1 of a {{ target }} is that on text of which {{ calibration.of(target).harmful_share }} is harmful, whatever the share of those rows.
{% endfor -%}
A recall or a rate is kept on those rows; on yours it may be another. `guard.json` has {{ "those of the categories, and " if calibration.categories }}on how many rows each stands.
"""


_EVALUATION = """\
## Evaluation

Harmfulness at the thresholds of policy {{ provenance.policy }}, with 95 % intervals by bootstrap over rows; measured by
`{{ provenance.command }}` at {{ "commit " ~ provenance.commit if provenance.commit else "lora-guard " ~ provenance["lora-guard"] }}.

| set | rows |{% for title in columns.values() %} {{ title }} |{% endfor %}
|---|---|{% for _ in columns %}---|{% endfor %}
{%- for name, entry in sets.items() %}
| {{ name }} | {{ "{:,}".format(entry.n) }} |{% for metric in columns %} {{ interval(entry.harmfulness[metric]) }} |{% endfor %}
{%- endfor %}

{% for name, entry in sets.items() if entry.macro_auprc is not none -%}
The mean AUPRC of the categories on {{ name }} is {{ "%.3f" | format(entry.macro_auprc) }}.

{% endfor -%}
Controls, simpler ways to the same verdicts (above or below where the intervals do not touch):
{% for name, entry in sets.items() %}
- {{ name }}: {{ verdict(entry)[0] }}
{%- endfor %}
{% for name, entry in sets.items() if entry.perturbations %}
Disguised texts of {{ name }}; the drop is of AUPRC:

| change | AUPRC | recall | FPR | drop |
|---|---|---|---|---|
{%- for change, figures in entry.perturbations.items() %}
| {{ change }} | {{ interval(figures.auprc) }} | {{ interval(figures.recall) }} | {{ interval(figures.fpr) }} | {{ interval(figures.drop) }} |
{%- endfor %}
{% endfor %}"""

_COLUMNS = {
    "auprc": "AUPRC",
    "f1": "F1",
    "recall": "recall",
    "fpr": "FPR",
    "tpr_at_fpr_5": "TPR at 5 % FPR",
    "ece": "ECE",
}

# Those of the hub's identifiers that are SPDX's in small letters; another licence is given there by its name.
_HUB_LICENCES = {
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
}  # fmt: skip

_ADAPTERS = {
    "lora": "low-rank adapters and linear heads",
    "alora": "activated low-rank adapters, which read the chat's own keys and values, and linear heads",
    "none": "linear heads on frozen features",
}


def model_card(spec: GuardSpec) -> str:
    """The card of a guard, Markdown."""
    adapter = _ADAPTERS[spec.adapter]
    categories = spec.taxonomy["categories"]
    calibration = _calibration(spec)
    return _render(
        _TEMPLATE,
        spec=spec,
        adapter=adapter,
        categories=categories,
        calibration=calibration,
        figure=_figure,
        hub_licences=_HUB_LICENCES,
    )


def with_calibration(card: str, spec: GuardSpec) -> str:
    """A card with the section on calibration that the spec asks for, in the old one's place or else at the end.

    All else stays, for a card may have been written by hand.
    """
    return _with_section(card, _calibration(spec))


def evaluated(guard: str, out: Path) -> None:
    """Put what an evaluation wrote into a guard's card.

    Args:
        guard: as ``--guard`` names it.
        out: the folder of the evaluation.

    Raises:
        ArtifactError: there is no such guard.
        ResourceError: the card cannot be written.
    """
    path = find(guard) / CARD_FILE
    card = path.read_text("utf-8") if path.is_file() else f"# {guard}\n"
    files.write_text(path, with_evaluation(card, json.loads((out / "results.json").read_text("utf-8"))))


def with_evaluation(card: str, results: Mapping[str, Any]) -> str:
    """A card with the section on evaluation, in the old one's place or else at the end.

    Args:
        card: Markdown.
        results: the contents of ``results.json``.
    """
    sets = {name: {"perturbations": {}, **e} for name, e in results["datasets"].items() if e["harmfulness"]}
    section = _render(
        _EVALUATION,
        provenance=results["provenance"],
        sets=sets,
        columns=_COLUMNS,
        interval=shown,
        verdict=verdict_on_controls,
    )
    return _with_section(card, f"{section.rstrip()}\n")


def _with_section(card: str, section: str) -> str:
    """The card with a section in place of the one of its heading, or else at the end."""
    heading, _, _ = section.partition("\n")
    before, found, rest = f"\n{card}".partition(f"\n{heading}\n")
    if not found:
        return f"{card.rstrip()}\n\n{section}"
    _, next_heading, after = rest.partition("\n## ")
    return f"{before[1:]}\n{section}{next_heading}{after}"


def _calibration(spec: GuardSpec) -> str:
    return _render(
        _CALIBRATION,
        calibration=spec.calibration,
        record=spec.provenance.get("calibration"),
        tokens=spec.provenance.get("token_head"),
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(keep_trailing_newline=True, autoescape=False, undefined=StrictUndefined)
    return environment.from_string(template).render(values)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
