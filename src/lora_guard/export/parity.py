"""Replays a bundle's test vectors on a GGUF model: what the device gives against what the guard's own model gave."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_guard.engine import device_guard
from lora_guard.engine.llama_cpp import F32, Model
from lora_guard.errors import ArtifactError
from lora_guard.export.bundle import Bundle, read_vectors
from lora_guard.export.texts import conversations
from lora_guard.verdict import GuardLogits

Array = NDArray[Any]

FEATURES = 1e-4
"""The largest difference of a feature, over the largest feature, that fp32 may show."""
FLIPS = 0.02
"""The share of verdicts that quantisation may flip after recalibration."""


@dataclass(frozen=True)
class Parity:
    """The differences on ``rows`` vectors. Feature differences are shares of the largest feature of the row."""

    model: str
    exact: bool
    """Whether the model is in fp32, where the features themselves must agree."""
    rows: int
    feature_median: float
    feature_max: float
    score_mean: float
    score_max: float
    flagged: int
    """Verdicts on harmfulness that are flags, by the guard's own model as it was exported."""
    flips: int
    """Verdicts on harmfulness that differ from those at the bundle's threshold, which may be calibrated anew."""
    flips_recalibrated: int
    """Likewise at the threshold of each target that suits the device's scores best."""

    @property
    def passed(self) -> bool:
        if self.exact:
            return self.feature_max <= FEATURES
        return self.both_kinds and self.flips_recalibrated <= FLIPS * self.rows

    @property
    def both_kinds(self) -> bool:
        """Whether more verdicts of either kind could flip than may: with fewer, a check of them could not fail."""
        return min(self.flagged, self.rows - self.flagged) > FLIPS * self.rows

    def to_markdown(self) -> str:
        """A table, with the criterion below."""
        lines = [
            "| difference from the guard's own model | |",
            "|---|---|",
            f"| model | {self.model} |",
            f"| test vectors | {self.rows} |",
            f"| features, of the row's largest: median, highest | {self.feature_median:.2g}, {self.feature_max:.2g} |",
            f"| harmfulness score: mean, highest | {self.score_mean:.2g}, {self.score_max:.2g} |",
            f"| verdicts of the guard's own model that are flags | {self.flagged} |",
            f"| verdicts that flip, at the bundle's threshold | {self.flips} |",
            f"| verdicts that flip, at the threshold that suits them best | {self.flips_recalibrated} |",
        ]
        needed = f"features within {FEATURES:g}"
        if not self.exact:
            needed = f"at most {FLIPS:.0%} of the verdicts flip"
            if not self.both_kinds:
                needed += ", of some that are flags and some that are not; export with --data for rows of both kinds"
        return "\n".join([*lines, "", f"{'Passed' if self.passed else 'FAILED'}: needed with this model: {needed}."])


def check(bundle: Bundle, model: Model, done: Callable[[int], None] = lambda rows: None) -> Parity:
    """Replay the vectors on the model; ``done`` is called with the number of rows as they are read.

    Raises:
        ArtifactError: the bundle has no vectors, does not fit the model, or the model's tokens are other ones.
    """
    vectors = read_vectors(bundle)
    engine = device_guard.engine(bundle, model)
    rows = [ids.tolist() for ids in np.split(vectors["ids"], vectors["lengths"].cumsum()[:-1])]
    texts = conversations()
    if missing := {"flagged", "token_logits"} - vectors.keys():
        raise ArtifactError(
            f"{bundle.folder} was exported without {min(missing)!r}, by an older version; run: lora-guard export"
        )
    if vectors["own"][0] != len(texts):
        raise ArtifactError(
            f"{bundle.folder} was exported with {vectors['own'][0]} test texts; allowed: this version's {len(texts)}; "
            "run: lora-guard export"
        )
    for conversation, row in zip(texts, rows, strict=False):  # rows of the user's own follow
        rendered = engine.renderer.judged(conversation, conversation.target, bundle.spec.invocation)
        if rendered.windows(bundle.spec.max_length)[0] != row:
            raise ArtifactError(
                f"{str(model.path)!r} turns a test text into other tokens than the model of {bundle.folder}; allowed: "
                "a .gguf file with the same vocabulary and chat template"
            )
    features = []
    for _, passed in engine.features(rows):
        features += passed
        done(len(passed))
    return _compared(bundle, model, vectors, np.stack(features), np.stack([engine.heads(row) for row in features]))


def _compared(bundle: Bundle, model: Model, vectors: dict[str, Array], features: Array, logits: Array) -> Parity:
    expected = vectors["features"]
    differences = np.abs(features - expected).max(1) / np.abs(expected).max(1)
    responses = vectors["responses"] == 1
    logits, own_logits = (
        rows + np.eye(1, rows.shape[1]) * vectors["token_logits"][:, None] for rows in (logits, vectors["logits"])
    )
    (scores, flagged), (own_scores, _) = (_decided(bundle, rows, responses) for rows in (logits, own_logits))
    own_flagged = vectors["flagged"] == 1
    return Parity(
        model=model.path.name,
        exact=model.file_type == F32,
        rows=len(features),
        feature_median=float(np.median(differences)),
        feature_max=float(differences.max()),
        score_mean=float(np.abs(scores - own_scores).mean()),
        score_max=float(np.abs(scores - own_scores).max()),
        flagged=int(own_flagged.sum()),
        flips=int((own_flagged != flagged).sum()),
        flips_recalibrated=sum(fewest_flips(scores[rows], own_flagged[rows]) for rows in (responses, ~responses)),
    )


def _decided(bundle: Bundle, logits: Array, responses: Array) -> tuple[Array, Array]:
    """Harmfulness scores and flags, both ``[rows]``, of logits ``[rows, 1 + K]``."""
    calibration = bundle.spec.calibration
    verdicts = [
        calibration.verdict(GuardLogits.highest([row.tolist()]), "response" if response else "prompt")
        for row, response in zip(logits, responses, strict=True)
    ]
    return np.array([verdict.score for verdict in verdicts]), np.array([verdict.flagged for verdict in verdicts])


def fewest_flips(scores: Array, verdicts: Array) -> int:
    """How many verdicts ``[rows]`` differ at the threshold on ``scores`` [rows] that suits them best."""
    thresholds = [*scores, np.inf]
    return min(int((verdicts != (scores >= threshold)).sum()) for threshold in thresholds)
