"""Public test sets on the Hugging Face hub: each one's own columns as rows in the project's form."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_guard.data.example import Example, parse_row
from lora_guard.errors import DataError, allowed
from lora_guard.taxonomy import BEAVERTAILS, Taxonomy

Row = Mapping[str, Any]


@dataclass(frozen=True)
class PublicSet:
    """A test set: where it is on the hub, and how one of its rows becomes rows of ours (several, or none)."""

    hub: str
    split: str
    convert: Callable[[Row], Iterator[dict[str, Any]]]
    config: str | None = None


def read_public(name: str, taxonomy: Taxonomy) -> list[Example]:
    """The examples of one of :data:`PUBLIC_SETS`.

    Harm categories are kept where the set's are the taxonomy's own (BeaverTails); elsewhere the set's kind of row goes
    into ``source`` (``xstest: homonyms``), by which results are sliced.

    Raises:
        DataError: an unknown name, no access to the hub, or columns that are not those the set is known to have.
    """
    if name not in PUBLIC_SETS:
        raise DataError(f"public set {name!r} is unknown; {allowed(name, PUBLIC_SETS)}")
    chosen = PUBLIC_SETS[name]
    examples = []
    for number, row in enumerate(_load(chosen), 1):
        where = f"{chosen.hub}:{number}"
        try:
            converted = list(chosen.convert(row))
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{where}: not in the form that {name} is known by; it has {', '.join(row)}") from error
        for ours in converted:
            if taxonomy.name != BEAVERTAILS:
                ours.pop("categories", None)
            examples.append(parse_row(ours, taxonomy, where, name))
    if not examples:
        raise DataError(f"hub data set {chosen.hub!r} has no labelled row")
    return examples


def _load(chosen: PublicSet) -> Any:
    import datasets

    try:
        return datasets.load_dataset(chosen.hub, chosen.config, split=chosen.split)
    except Exception as error:  # the hub client raises errors of a dozen libraries
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"hub data set {chosen.hub!r} cannot be loaded: {reason}") from error


def _beavertails(row: Row) -> Iterator[dict[str, Any]]:
    yield {
        "prompt": row["prompt"],
        "response": row["response"],
        "unsafe": not row["is_safe"],
        "categories": row["category"],
    }


def _toxicchat(row: Row) -> Iterator[dict[str, Any]]:
    """Only what people annotated: the other rows carry the label of a model."""
    if row["human_annotation"]:
        yield {"prompt": row["user_input"], "unsafe": bool(row["toxicity"])}


_OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")


def _openai_moderation(row: Row) -> Iterator[dict[str, Any]]:
    """Harmful if any label is set; a label that was not given counts as not set, as in the set's own use."""
    yield {"prompt": row["prompt"], "unsafe": any(row[label] == 1 for label in _OPENAI_LABELS)}


def _xstest(row: Row) -> Iterator[dict[str, Any]]:
    yield {"prompt": row["prompt"], "unsafe": row["label"] == "unsafe", "source": f"xstest: {row['type']}"}


def _or_bench_hard(row: Row) -> Iterator[dict[str, Any]]:
    """Harmless prompts that models tend to refuse."""
    yield {"prompt": row["prompt"], "unsafe": False, "source": f"or-bench-hard: {row['category']}"}


def _or_bench_toxic(row: Row) -> Iterator[dict[str, Any]]:
    yield {"prompt": row["prompt"], "unsafe": True, "source": f"or-bench-toxic: {row['category']}"}


def _harmbench(row: Row) -> Iterator[dict[str, Any]]:
    """Behaviours asked for in plain words; all of them are harmful."""
    yield {"prompt": row["prompt"], "unsafe": True, "source": f"harmbench: {row['category']}"}


_WILDGUARD = {"harmful": True, "unharmful": False}


def _wildguard_prompts(row: Row) -> Iterator[dict[str, Any]]:
    kind = "adversarial" if row["adversarial"] else "vanilla"
    label = row["prompt_harm_label"]
    if label is not None:  # the annotators did not agree
        yield {"prompt": row["prompt"], "unsafe": _WILDGUARD[label], "source": f"wildguardtest: {kind}"}


def _wildguard_responses(row: Row) -> Iterator[dict[str, Any]]:
    label = row["response_harm_label"]
    if label is not None and row["response"]:
        for ours in _wildguard_prompts({**row, "prompt_harm_label": label}):
            yield {**ours, "response": row["response"]}


_AEGIS = {"safe": False, "unsafe": True}


def _aegis_prompts(row: Row) -> Iterator[dict[str, Any]]:
    """Rows whose text is withheld (``REDACTED``) are left out."""
    if row["reconstruction_id_if_redacted"] is None:
        yield {"prompt": row["prompt"], "unsafe": _AEGIS[row["prompt_label"]]}


def _aegis_responses(row: Row) -> Iterator[dict[str, Any]]:
    if row["reconstruction_id_if_redacted"] is None and row["response"] and row["response_label"]:
        yield {"prompt": row["prompt"], "response": row["response"], "unsafe": _AEGIS[row["response_label"]]}


_AEGIS_HUB = "nvidia/Aegis-AI-Content-Safety-Dataset-2.0"

PUBLIC_SETS: Mapping[str, PublicSet] = {
    "beavertails_30k_test": PublicSet("PKU-Alignment/BeaverTails", "30k_test", _beavertails),
    "toxicchat_test": PublicSet("lmsys/toxic-chat", "test", _toxicchat, "toxicchat0124"),
    "openai_moderation": PublicSet("mmathys/openai-moderation-api-evaluation", "train", _openai_moderation),
    "xstest": PublicSet("Paul/XSTest", "train", _xstest),
    "or_bench_hard": PublicSet("bench-llm/or-bench", "train", _or_bench_hard, "or-bench-hard-1k"),
    "or_bench_toxic": PublicSet("bench-llm/or-bench", "train", _or_bench_toxic, "or-bench-toxic"),
    "harmbench": PublicSet("walledai/HarmBench", "train", _harmbench, "standard"),
    "wildguardtest_prompts": PublicSet("allenai/wildguardmix", "test", _wildguard_prompts, "wildguardtest"),
    "wildguardtest_responses": PublicSet("allenai/wildguardmix", "test", _wildguard_responses, "wildguardtest"),
    "aegis2_prompts": PublicSet(_AEGIS_HUB, "test", _aegis_prompts),
    "aegis2_responses": PublicSet(_AEGIS_HUB, "test", _aegis_responses),
}
"""Name in results -> the set. The names of the first three are those of the files that hold the same rows."""
