"""The model card that every guard folder carries as its README."""

# ruff: noqa: E501  (Markdown tables)

from typing import Any

from jinja2 import Environment, StrictUndefined

from lora_guard.artifact import GuardSpec

_TEMPLATE = """\
---
library_name: lora-guard
base_model: {{ spec.base.name }}
tags: [content-moderation, lora, guardrail]
{%- if spec.licence %}
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
## Metrics

Harmfulness after epoch {{ spec.metrics.epoch }}, at threshold 0.5.

| set | AUPRC | AUROC | precision | recall | F1 | FPR | accuracy |
|---|---|---|---|---|---|---|---|
{%- for name, metrics in spec.metrics.sets.items() %}
| {{ name }} |{% for key in ["auprc", "auroc", "precision", "recall", "f1", "fpr", "accuracy"] %} {{ figure(metrics.get(key)) }} |{% endfor %}
{%- endfor %}

{{ calibration }}
## How it was made

    lora-guard train RUN --config config.yaml --set data_root=DATA

`config.yaml` is what `guard.json` holds under `provenance.config`, and DATA the folder of the files it names. Python {{ spec.provenance.python }}, torch {{ spec.provenance.torch }},
transformers {{ spec.provenance.transformers }}, peft {{ spec.provenance.peft }}.

## Limits

A score is an estimate, not a ruling: it is wrong on some text, more often on text unlike the training data, and it says
nothing of whether a statement is true. Judge the thresholds on your own data before you block anything by them.
"""


_CALIBRATION = """\
## Calibration

A score is the estimated probability of harm on text like the rows it was calibrated on:
{%- if record %} {{ "{:,}".format(record.rows) }} rows of {% for part in record.data %}{{ ", " if not loop.first }}`{{ part.file }}`{% endfor %}.
{%- else %} the validation rows of the run.{% endif %}
A text is flagged from its policy's threshold on; those of harmfulness:

| policy | chosen by | prompt | response |
|---|---|---|---|
{%- for name, policy in calibration.policies.items() %}
| {{ name }}{{ " (default)" if name == calibration.default_policy }} | {{ policy }} |
{%- for target in ["prompt", "response"] %} {{ "%.3f" | format(calibration.of(target).harmful.thresholds[name]) }} |{% endfor %}
{%- endfor %}

A recall or a rate is kept on those rows; on yours it may be another. `guard.json` has {{ "those of the categories, and " if calibration.categories }}on how many rows each stands.
"""


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
        _TEMPLATE, spec=spec, adapter=adapter, categories=categories, calibration=calibration, figure=_figure
    )


def with_calibration(card: str, spec: GuardSpec) -> str:
    """A card with the section on calibration that the spec asks for, in the old one's place or else at the end.

    All else stays, for a card may have been written by hand.
    """
    before, heading, rest = f"\n{card}".partition("\n## Calibration\n")
    if not heading:
        return f"{card.rstrip()}\n\n{_calibration(spec)}"
    _, next_heading, after = rest.partition("\n## ")
    return f"{before[1:]}\n{_calibration(spec)}{next_heading}{after}"


def _calibration(spec: GuardSpec) -> str:
    return _render(_CALIBRATION, calibration=spec.calibration, record=spec.provenance.get("calibration"))


def _render(template: str, **values: Any) -> str:
    environment = Environment(keep_trailing_newline=True, autoescape=False, undefined=StrictUndefined)
    return environment.from_string(template).render(values)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
