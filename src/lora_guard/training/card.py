"""The model card that every guard folder carries as its README."""

# ruff: noqa: E501  (Markdown tables)

from jinja2 import Environment

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
model. It scores how harmful a prompt or a response is, and {{ categories | length }} categories of harm. It is no chat model and
does not change the one it stands beside.

| | |
|---|---|
| Base model | {{ spec.base.name }}{% if spec.base.revision %} at {{ spec.base.revision }}{% endif %} |
{%- if spec.base.note %}
| The base is | {{ spec.base.note }} |
{%- endif %}
| Base weights | `{{ spec.base.fingerprint }}` |
| Taxonomy | {{ spec.taxonomy.name }}: {{ categories | join("; ") }} |
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

Harmfulness after epoch {{ spec.metrics.epoch }}, at threshold 0.5. The thresholds saved with the guard are those of the best F1 on
the validation rows ({{ "%.3f" | format(spec.calibration.harmful.threshold) }} for harmfulness).

| set | AUPRC | AUROC | precision | recall | F1 | FPR | accuracy |
|---|---|---|---|---|---|---|---|
{%- for name, metrics in spec.metrics.sets.items() %}
| {{ name }} |{% for key in ["auprc", "auroc", "precision", "recall", "f1", "fpr", "accuracy"] %} {{ figure(metrics.get(key)) }} |{% endfor %}
{%- endfor %}

## How it was made

    lora-guard train RUN --config config.yaml --set data_root=DATA

`config.yaml` is what `guard.json` holds under `provenance.config`, and DATA the folder of the files it names. Python {{ spec.provenance.python }}, torch {{ spec.provenance.torch }},
transformers {{ spec.provenance.transformers }}, peft {{ spec.provenance.peft }}.

## Limits

A score is an estimate, not a ruling: it is wrong on some text, more often on text unlike the training data, and it says
nothing of whether a statement is true. Judge the thresholds on your own data before you block anything by them.
"""


_ADAPTERS = {
    "lora": "low-rank adapters and linear heads",
    "alora": "activated low-rank adapters, which read the chat's own keys and values, and linear heads",
    "none": "linear heads on frozen features",
}


def model_card(spec: GuardSpec) -> str:
    """The card of a guard, Markdown."""
    adapter = _ADAPTERS[spec.adapter]
    template = Environment(keep_trailing_newline=True, autoescape=False).from_string(_TEMPLATE)
    return template.render(spec=spec, adapter=adapter, categories=spec.taxonomy["categories"], figure=_figure)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
