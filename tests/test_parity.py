"""``lora-guard export`` and its check: fp32 must agree, quantised models may flip few verdicts, the rest is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf
from typer.testing import CliRunner

from lora_guard import base_model
from lora_guard.cli import app
from lora_guard.errors import ModelError
from lora_guard.export.texts import conversations

parity = pytest.importorskip("lora_guard.export.parity", reason="needs the extra 'device'", exc_type=ModelError)
pytestmark = pytest.mark.extras


@pytest.fixture(scope="module", params=[("lora", False), ("alora", True), ("none", False)], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle and its base model's GGUF file."""
    folder = tmp_path_factory.mktemp("guard")
    kind, token_head = request.param
    guard = tiny_guard_folder(folder, adapter_kind=kind, max_length=400, strength=0.005, token_head=token_head)
    file = tiny_gguf(folder / "base.gguf", base_model.load(str(folder / "base")).model)
    words = ["export", str(folder / "bundle"), "--guard", str(guard), "--model", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Passed" in result.stdout
    return folder / "bundle", file


def test_what_export_measured_is_in_the_readme_and_a_check_finds_it_again(made: tuple[Path, Path]) -> None:
    folder, file = made
    result = CliRunner().invoke(app, ["export", "--check", str(folder), "--model", str(file)])
    assert result.exit_code == 0
    assert result.stdout.strip() in (folder / "README.md").read_text("utf-8")


@pytest.fixture
def altered(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A GGUF file of the base model whose weights differ a little from the guard's."""
    model = base_model.load(str(made[0].parent / "base")).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter += 0.02
    return tiny_gguf(tmp_path / "altered.gguf", model)


def test_the_check_fails_on_weights_that_differ_a_little(made: tuple[Path, Path], altered: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--check", str(made[0]), "--model", str(altered)])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_an_export_that_fails_its_own_measurement_says_so_and_keeps_the_bundle(
    made: tuple[Path, Path], altered: Path, tmp_path: Path
) -> None:
    guard, out = made[0].parent / "guard", tmp_path / "bundle"
    result = CliRunner().invoke(app, ["export", str(out), "--guard", str(guard), "--model", str(altered)])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "FAILED" in (out / "README.md").read_text("utf-8")


def test_another_base_is_refused_by_its_norms(made: tuple[Path, Path], tmp_path: Path) -> None:
    model = base_model.load(str(made[0].parent / "base")).model
    with torch.no_grad():
        model.get_decoder().norm.weight += 0.1
    file = tiny_gguf(tmp_path / "other.gguf", model)
    result = CliRunner().invoke(app, ["export", "--check", str(made[0]), "--model", str(file)])
    assert result.exit_code == 1
    assert "has other norms than that" in result.stderr


PARITY = parity.Parity("x.gguf", False, 100, 0.01, 0.1, 0.01, 0.1, 40, 5, 2)


@pytest.mark.parametrize(
    ("changed", "passed"),
    [
        ({}, True),
        ({"flips_recalibrated": 3}, False),
        ({"flagged": 2, "flips_recalibrated": 0}, False),
        ({"flagged": 98, "flips_recalibrated": 0}, False),
        ({"exact": True}, False),
        ({"exact": True, "feature_max": 1e-4, "flips_recalibrated": 50}, True),
    ],
)
def test_fp32_is_held_to_its_features_and_the_rest_to_its_verdicts(changed: dict[str, float], passed: bool) -> None:
    assert dataclasses.replace(PARITY, **changed).passed == passed


def test_a_check_that_could_not_fail_asks_for_rows_of_both_kinds() -> None:
    assert "export with --data" in dataclasses.replace(PARITY, flagged=0).to_markdown()
    assert "--data" not in PARITY.to_markdown()


def test_a_bundle_with_other_test_texts_is_refused(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "conversations", lambda: conversations()[:-1])
    result = CliRunner().invoke(app, ["export", "--check", str(made[0]), "--model", str(made[1])])
    assert result.exit_code == 1
    assert "was exported with 108 test texts; allowed: this version's 107" in result.stderr


def test_recalibration_takes_the_threshold_with_the_fewest_flips() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert parity.fewest_flips(scores, np.array([False, False, True, True])) == 0
    assert parity.fewest_flips(scores, np.array([True, False, False, False])) == 1
    assert parity.fewest_flips(scores, np.zeros(4, bool)) == 0
    assert parity.fewest_flips(scores, np.ones(4, bool)) == 0
