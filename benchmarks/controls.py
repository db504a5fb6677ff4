"""Measures the controls a guard must beat, and records them in the package with command, commit and config.

    python benchmarks/controls.py tf-idf --config configs/smollm2-135m-alora.yaml --data DATA --harmful-share prompt=0.3
    python benchmarks/controls.py record RESULTS --title "heads alone" --config configs/control-none.yaml \\
        --guard smollm2-135m-alora

``tf-idf`` trains a logistic regression on word and character n-grams of the same rows as the config's guard, chooses
its regularisation on that config's validation rows alone, calibrates it on them as ``lora-guard calibrate`` does, and
evaluates it on the files that the config keeps out.
``record`` takes what ``lora-guard eval --out RESULTS`` wrote of a guard trained by the config. Both replace the control
of the same title and guard in ``src/lora_guard/evaluation/controls.json``; ``lora-guard eval`` shows it beside that
guard on the same data, and beside guards without controls of their own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import FeatureUnion

from lora_guard import files
from lora_guard.calibrate_command import shares
from lora_guard.config import TrainConfig
from lora_guard.conversation import TARGETS, Target
from lora_guard.data.example import Example
from lora_guard.evaluation.calibrate import BALANCED, fit, scores
from lora_guard.evaluation.metrics import Bools, with_intervals
from lora_guard.evaluation.provenance import commit
from lora_guard.evaluation.references import CONTROLS_FILE, Control, ControlFigures, control_from_results
from lora_guard.evaluation.sets import read_sets
from lora_guard.taxonomy import Taxonomy
from lora_guard.training.rows import choose
from lora_guard.verdict import Policy

BEST_F1 = Policy(rule="best_f1")
REGULARISATIONS = (0.3, 1.0, 3.0, 10.0, 30.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tf_idf = commands.add_parser("tf-idf")
    tf_idf.add_argument("--config", required=True, help="the training config whose rows it learns from")
    tf_idf.add_argument("--data", required=True, help="folder that the config's paths start from")
    tf_idf.add_argument("--harmful-share", action="append", default=[], help="as of lora-guard calibrate")
    record = commands.add_parser("record")
    record.add_argument("results", type=Path, help="folder that an evaluation wrote")
    record.add_argument("--title", required=True)
    record.add_argument("--config", required=True, help="the training config of the control")
    record.add_argument("--guard", required=True, action="append", help="the name of a guard whose control it is")
    arguments = parser.parse_args()
    if arguments.command == "tf-idf":
        save(train_tf_idf(arguments.config, arguments.data, arguments.harmful_share))
    else:
        command = f"lora-guard train RUN --config {arguments.config} --set data_root=DATA"
        update = {
            "title": arguments.title,
            "guards": arguments.guard,
            "config": arguments.config,
            "command": command,
        }
        save(control_from_results(arguments.results).model_copy(update=update))


def save(control: Control) -> None:
    """Put a control into the package's file, in place of the one of its title and guards."""
    entries = json.loads(CONTROLS_FILE.read_text("utf-8"))
    others = [entry for entry in entries if (entry["title"], entry["guards"]) != (control.title, control.guards)]
    files.write_json(CONTROLS_FILE, [*others, control.model_dump(mode="json")])
    for figures in control.sets.values():
        shown = {name: figures.harmfulness[name] for name in ("auprc", "f1", "fpr")}
        print(control.title, figures.name, json.dumps(shown))


def train_tf_idf(config_file: str, data: str, harmful_shares: list[str]) -> Control:
    """Train, choose and calibrate on validation rows, evaluate on the files that the config keeps out."""
    config = TrainConfig.load(config_file, [f"data_root={data}"])
    taxonomy = Taxonomy.load(config.taxonomy)
    tests, _ = read_sets([str(Path(data) / source.path) for source in config.keep_out], None, taxonomy)
    examples = choose(config, taxonomy)
    texts, labels, _ = labelled(examples.train)
    weights = [
        origin.weight
        for origin, example in zip(examples.origins, examples.train, strict=True)
        if example.harmful is not None
    ]
    held_out, held_out_labels, held_out_targets = labelled(examples.validation)
    if held_out_labels.all() or not held_out_labels.any():
        sys.exit("error: the validation rows hold harmful rows alone, or none; needed: both")
    model: Any
    best, model = -1.0, None
    features = n_grams()
    train_features, held_out_features = features.fit_transform(texts), features.transform(held_out)
    for regularisation in REGULARISATIONS:
        candidate = LogisticRegression(C=regularisation, class_weight="balanced", max_iter=2000)
        candidate.fit(train_features, labels, sample_weight=weights)
        auprc = average_precision_score(held_out_labels, candidate.predict_proba(held_out_features)[:, 1])
        print(f"C {regularisation}: validation AUPRC {auprc:.4f}", file=sys.stderr)
        if auprc > best:
            best, model = auprc, candidate
    logits = model.decision_function(held_out_features)[:, None]
    fitted_on = (logits, held_out_labels[:, None].astype(float), held_out_targets)
    calibration = fit(*fitted_on, [], BEST_F1, shares(harmful_shares, BEST_F1))
    cuts = {target: calibration.of(target).harmful.thresholds[BALANCED] for target in TARGETS}
    sets = {}
    for part in tests:
        test_texts, test_labels, targets = labelled(part.examples)
        logits = model.decision_function(features.transform(test_texts))[:, None]
        found, saved = scores(calibration, logits, targets)[:, 0], np.array([cuts[target] for target in targets])
        metrics = with_intervals(found, test_labels, saved)
        sets[part.sha256] = ControlFigures(name=part.name, n=len(part.examples), harmfulness=metrics)
    words = "".join(f" --harmful-share {share}" for share in harmful_shares)
    return Control(
        title="TF-IDF and logistic regression",
        guards=[config.name or Path(config_file).stem],
        config=config_file,
        command=f"python benchmarks/controls.py tf-idf --config {config_file} --data DATA{words}",
        commit=commit() or "unknown",
        parameters=model.coef_.size + model.intercept_.size,
        sets=sets,
    )


def n_grams() -> FeatureUnion:
    """Words and pairs of words, and three to five characters within words."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=3, sublinear_tf=True)
    return FeatureUnion([("words", words), ("characters", characters)])


def labelled(examples: list[Example]) -> tuple[list[str], Bools, list[Target]]:
    """The texts, plainly rendered, labels and targets of the examples whose harmfulness is known."""
    known = [example for example in examples if example.harmful is not None]
    texts = [f"user: {e.prompt}" + ("" if e.response is None else f"\n\nassistant: {e.response}") for e in known]
    return texts, np.array([example.harmful for example in known], dtype=bool), [e.target for e in known]


if __name__ == "__main__":
    main()
