"""``lora-guard calibrate`` writes a guard of the same weights whose verdicts are those of the new calibration."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guards import tiny_guard_folder
from typer.testing import CliRunner

from lora_guard import Conversation, Guard, artifact, files
from lora_guard.calibrate_command import show
from lora_guard.cli import app
from lora_guard.errors import ResourceError
from lora_guard.verdict import Policy

WEIGHTS = ["adapter_config.json", "adapter_model.safetensors", "heads.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


def rows() -> list[dict[str, Any]]:
    """Prompts and responses; category a is known of two thirds, b of nothing; two rows have no label at all."""
    made: list[dict[str, Any]] = []
    for n in range(80):
        row: dict[str, Any] = {"prompt": f"question {n // 2} " + "x" * (n % 7), "unsafe": n % 3 == 0}
        if n % 2:
            row["response"] = "y" * (1 + n % 5)
        if n % 3:
            row["categories"] = {"a": n % 4 == 0}
        made.append(row)
    return [*made, {"prompt": "nobody said"}, {"prompt": "nobody said", "unsafe": None, "categories": {"a": None}}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    return path


def run(*words: str | Path) -> Any:
    result = CliRunner().invoke(app, ["calibrate", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refusal(*words: str | Path) -> str:
    result = run(*words)
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()
    return str(line)


def verdicts(guard: Guard) -> dict[str, list[tuple[bool, bool]]]:
    """Flag and label of the labelled rows, by target."""
    known = [row for row in rows() if row.get("unsafe") is not None]
    found = guard.moderate([Conversation.of(row["prompt"], row.get("response")) for row in known])
    pairs: dict[str, list[tuple[bool, bool]]] = {"prompt": [], "response": []}
    for row, verdict in zip(known, found, strict=True):
        pairs[verdict.target].append((verdict.flagged, row["unsafe"]))
    return pairs


def rate(pairs: list[tuple[bool, bool]], label: bool) -> float:
    return float(np.mean([flagged for flagged, harmful in pairs if harmful is label]))


def test_the_new_guard_has_the_same_weights_and_keeps_the_rate_on_each_target(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "out"
    assert run("--guard", folder, "--data", data, "--target-fpr", "0.2", "--out", out).exit_code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all((out / name).read_bytes() == before[name] for name in WEIGHTS)
    spec, old = artifact.read_spec(out), artifact.read_spec(folder)
    assert spec.files == old.files
    assert spec.model_dump(exclude={"calibration", "provenance"}) == old.model_dump(
        exclude={"calibration", "provenance"}
    )
    assert spec.calibration.policies["balanced"] == Policy(rule="target_fpr", value=0.2)
    for pairs in verdicts(Guard.load(out, bulk=True)).values():
        assert rate(pairs, False) <= 0.2
    for pairs in verdicts(Guard.load(out, bulk=True, policy="strict")).values():
        assert rate(pairs, True) >= 0.95
    for pairs in verdicts(Guard.load(out, bulk=True, policy="permissive")).values():
        assert rate(pairs, False) <= 0.02


def test_a_share_of_harmful_texts_raises_the_thresholds_of_its_target(folder: Path, data: Path, tmp_path: Path) -> None:
    plain, rare = tmp_path / "plain", tmp_path / "rare"
    assert run("--guard", folder, "--data", data, "--out", plain).exit_code == 0
    words = ["--guard", folder, "--data", data, "--out", rare, "--harmful-share"]
    assert run(*words, "prompt=0.05").exit_code == 0
    before, after = (artifact.read_spec(out).calibration for out in (plain, rare))
    assert after.prompt.harmful_share == 0.05
    assert after.prompt.harmful.thresholds["balanced"] > before.prompt.harmful.thresholds["balanced"]
    assert after.response == before.response
    assert after.policies == before.policies
    said = "Best F1 of a prompt is that on text of which 0.05 is harmful"
    assert [said in (out / "README.md").read_text("utf-8") for out in (plain, rare)] == [False, True]
    for wrong in ("answer=0.1", "prompt", "prompt=1", "response=nan", "=0.1"):
        assert f"--harmful-share '{wrong}'; allowed: prompt or response" in refusal(*words, wrong)
    assert "changes the best F1" in refusal(*words, "prompt=0.1", "--target-fpr", "0.1")


def test_guard_and_card_say_on_which_rows_the_calibration_stands(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--guard", folder, "--data", data, "--out", out)
    spec = artifact.read_spec(out)
    record = spec.provenance["calibration"]
    assert record["rows"] == 80
    assert record["data"] == [{"file": "mine.jsonl", "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}]
    assert list(record["ece"]) == ["before", "held_out"]
    harmful, a, b = spec.calibration.prompt.heads
    assert (harmful.rows, harmful.positives, harmful.fitted_on) == (40, 14, "prompt")
    assert a.rows == len([row for row in rows()[:80] if "categories" in row and "response" not in row])
    assert (b.rows, b.fitted_on, b.thresholds["balanced"]) == (0, "nothing", 0.5)
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith("# tiny\n\n## Calibration\n")
    assert "80 rows of `mine.jsonl`." in card
    assert str(data.parent) not in (out / "guard.json").read_text("utf-8") + card


def test_the_summary_has_every_head_of_every_target(folder: Path, data: Path, tmp_path: Path) -> None:
    words = ["--guard", folder, "--data", data, "--out", tmp_path / "out"]
    summary = json.loads(run(*words, "--json").stdout)
    heads = summary["heads"]
    assert [(row["target"], row["head"]) for row in heads] == [
        (target, head) for target in ("prompt", "response") for head in ("harmfulness", "a", "b")
    ]
    assert list(heads[0]["thresholds"]) == ["strict", "balanced", "permissive"]
    assert all(0 <= value <= 1 for error in (summary["ece"], heads[0]["ece"]) for value in error.values())
    assert heads[2]["ece"] == {"before": None, "held_out": None}
    shown = run(*words).stdout
    assert shown.count("harmfulness") == 2
    assert max(map(len, shown.splitlines())) <= 80


def test_the_table_fits_80_columns_with_thousands_of_rows_and_names_in_one_piece(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = {"rows": 12345, "positives": 6789, "temperature": 12.34, "bias": -12.34, "fitted_on": "both"}
    error = {"before": 0.123, "held_out": 0.045}
    thresholds = dict.fromkeys(("strict", "balanced", "permissive"), 0.123)
    heads = [
        {"target": target, "head": "harmfulness", **wide, "ece": error, "thresholds": thresholds}
        for target in ("prompt", "response")
    ]
    show({"ece": error, "heads": heads, "note": None}, as_json=False)
    shown = capsys.readouterr().out
    assert shown.count("harmfulness ") == 2
    assert shown.count("12345*") == 2
    assert max(map(len, shown.splitlines())) <= 80


def test_a_guard_may_be_calibrated_in_its_place_and_again(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--guard", folder, "--data", data, "--out", out)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run("--guard", out, "--data", data, "--out", out)
    second = {path.name: path.read_bytes() for path in out.iterdir()}
    assert first["README.md"] == second["README.md"]
    assert artifact.read_spec(out).calibration == type(artifact.read_spec(out).calibration).model_validate(
        json.loads(first["guard.json"])["calibration"]
    )


def test_an_evaluation_by_policy_uses_its_thresholds(folder: Path, data: Path, tmp_path: Path) -> None:
    run("--guard", folder, "--data", data, "--out", tmp_path / "out")
    found = {}
    for policy in ("strict", "balanced", "permissive"):
        words = ["eval", "--guard", str(tmp_path / "out"), "--data", str(data), "--policy", policy]
        CliRunner().invoke(app, [*words, "--resamples", "10", "--out", str(tmp_path / policy)], catch_exceptions=False)
        results = json.loads((tmp_path / policy / "results.json").read_text("utf-8"))
        assert results["provenance"]["policy"] == policy
        found[policy] = results["datasets"]["mine"]["harmfulness"]
    assert found["strict"]["recall"]["value"] >= 0.95
    assert found["permissive"]["fpr"]["value"] <= 0.02
    assert found["balanced"]["recall"]["value"] <= found["strict"]["recall"]["value"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b", "unsafe": null}\n', "has no labelled row; needed: 'unsafe' or 'categories'"),
        ('{"prompt": "a", "unsafe": true, "categories": {"c": true}}\n', "has no category 'c'"),
        ("", "is empty"),
    ],
)
def test_rows_that_teach_nothing_are_refused_and_nothing_is_written(
    folder: Path, data: Path, tmp_path: Path, text: str, message: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text, "utf-8")
    assert message in refusal("--guard", folder, "--out", tmp_path / "out", "--data", data, bad)
    assert not (tmp_path / "out").exists()


def test_what_is_no_guard_is_not_written_over(folder: Path, data: Path, tmp_path: Path) -> None:
    for out in (data, tmp_path):
        assert "exists and is not a guard" in refusal("--guard", folder, "--data", data, "--out", out)
    assert data.is_file()


@pytest.mark.parametrize("words", [["--target-fpr", "1.5"], ["--target-recall", "-1"], ["--target-fpr", "x"]])
def test_a_rate_outside_its_range_is_a_usage_error(words: list[str], data: Path, tmp_path: Path) -> None:
    result = run("--data", data, "--out", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert f"Invalid value for '{words[0]}'" in result.stderr


def test_a_full_disk_leaves_the_old_guard(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run("--guard", folder, "--data", data, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, content: bytes) -> None:
        raise ResourceError(f"{path} cannot be written: no space left on the disk")

    monkeypatch.setattr(files, "write_bytes", full)
    assert "no space left" in refusal("--guard", folder, "--data", data, "--target-fpr", "0.1", "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A training config whose harmful prompts are about fire, also beyond the rows that it trains on."""
    lines = [{"prompt": f"{'fire' if n % 2 else 'tea'} number {n}", "unsafe": bool(n % 2)} for n in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    config = tmp_path / "train.yaml"
    config.write_text(f"data_root: {tmp_path}\ntaxonomy: harmfulness\ntrain: [{{path: train.jsonl, rows: 10}}]\n")
    return config


@pytest.fixture
def fires(tmp_path: Path) -> Path:
    """Rows to calibrate on, of which a fifth is labelled the other way."""
    lines = [{"prompt": f"{'fire' if n % 2 else 'tea'}, {n} times", "unsafe": (n % 5 == 0) != n % 2} for n in range(60)]
    path = tmp_path / "fires.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_a_token_head_is_learned_from_a_configs_texts_and_stays_in_later_calibrations(
    folder: Path, fires: Path, sources: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("--guard", folder, "--data", fires, "--learn-tokens", sources, "--out", first).exit_code == 0
    spec = artifact.read_spec(first)
    assert spec.token_head
    assert spec.provenance["token_head"] == {"texts": 200, "sources": ["train"]}
    assert all((first / name).read_bytes() == (folder / name).read_bytes() for name in WEIGHTS)
    guard, plain = Guard.load(first), Guard.load(folder)
    gains = [
        guard.logits([Conversation.of(text)])[0].harmful - plain.logits([Conversation.of(text)])[0].harmful
        for text in ("fire", "tea")
    ]
    assert gains[0] > 0 > gains[1]
    assert "200 texts of train:" in (first / "README.md").read_text("utf-8")
    assert run("--guard", first, "--data", fires, "--out", second).exit_code == 0
    assert (second / "token_head.safetensors").read_bytes() == (first / "token_head.safetensors").read_bytes()
    assert artifact.read_spec(second).calibration == spec.calibration
    assert "200 texts of train:" in (second / "README.md").read_text("utf-8")
    third = tmp_path / "third"  # the head before has no part in learning another
    assert run("--guard", first, "--data", fires, "--learn-tokens", sources, "--out", third).exit_code == 0
    assert artifact.read_spec(third).files == spec.files


def test_what_a_token_head_cannot_be_learned_from_is_said(
    folder: Path, fires: Path, data: Path, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert refusal("--guard", folder, "--data", fires, "--set", "seed=1", "--out", out) == (
        "error: --set changes the configs of --learn-tokens; allowed: both"
    )
    (tmp_path / "train.jsonl").write_text('{"prompt": "fire", "unsafe": true}\n{"prompt": "sun", "unsafe": true}\n')
    words = ["--guard", folder, "--data", fires, "--learn-tokens", sources, "--out", out]
    assert refusal(*words) == (
        "error: the sources of --learn-tokens have 2 labelled texts; needed to learn from: harmful and other ones"
    )
    assert not out.exists()


def test_a_token_head_learns_from_the_sources_of_several_configs(
    folder: Path, fires: Path, sources: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.jsonl").write_text('{"prompt": "ice", "unsafe": true}\n{"prompt": "sun", "unsafe": false}\n')
    more = tmp_path / "more.yaml"
    more.write_text("taxonomy: harmfulness\ntrain: [{path: more.jsonl}]\n")
    words = ["--learn-tokens", sources, "--learn-tokens", more, "--set", f"data_root={tmp_path}"]
    out = tmp_path / "out"
    assert run("--guard", folder, "--data", fires, *words, "--out", out).exit_code == 0
    assert artifact.read_spec(out).provenance["token_head"] == {"texts": 202, "sources": ["train", "more"]}
    ice, sun = (Guard.load(out).logits([Conversation.of(text)])[0].harmful for text in ("ice", "sun"))
    old_ice, old_sun = (Guard.load(folder).logits([Conversation.of(text)])[0].harmful for text in ("ice", "sun"))
    assert ice - old_ice > 0 > sun - old_sun


def test_a_token_head_learns_nothing_from_prompts_that_it_is_weighed_on(
    folder: Path, fires: Path, sources: Path, tmp_path: Path
) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(fires.read_text("utf-8"))
    out = tmp_path / "out"
    assert run("--guard", folder, "--data", fires, "--learn-tokens", sources, "--out", out).exit_code == 0
    assert artifact.read_spec(out).provenance["token_head"]["texts"] == 200


def test_bad_sources_of_a_token_head_are_found_before_anything_is_scored(
    folder: Path, fires: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").unlink()
    monkeypatch.setattr(Guard, "logits", lambda *_, **__: pytest.fail("scored"))
    line = refusal("--guard", folder, "--data", fires, "--learn-tokens", sources, "--out", tmp_path / "out")
    assert "train.jsonl" in line
