"""``lora-guard export --to peft-seqcls``: PEFT gives the guard's logits, and what has no such form is refused."""

import io
import json
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from guards import tiny_guard_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from tiny import CONFIGS
from typer.testing import CliRunner

from lora_guard import Guard, artifact, base_model
from lora_guard.artifact import WEIGHTS_FILE, read_spec
from lora_guard.cli import app
from lora_guard.engine.torch_guard import save
from lora_guard.errors import ArtifactError
from lora_guard.export import peft_seqcls
from lora_guard.export.texts import conversations
from lora_guard.verdict import Calibrator, GuardLogits

SCRIPT = Path(__file__).parents[1] / "examples" / "verify_peft_seqcls.py"


def export(guard: Path, out: Path) -> str:
    result = CliRunner().invoke(app, ["export", str(out), "--guard", str(guard), "--to", "peft-seqcls"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module", params=["llama", "phi3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard folder with heads that have a bias, and ``seqcls`` beside it."""
    guard = tiny_guard_folder(tmp_path_factory.mktemp("guard"), request.param, max_length=400)
    loaded = Guard.load(guard, precision="fp32")
    with torch.no_grad():
        loaded.engine.model.heads.bias.copy_(torch.tensor([0.7, -1.3, 2.0]))
    save(loaded.engine.model, loaded.spec, guard, card="# tiny\n")
    assert export(guard, guard.parent / "seqcls") == f"{guard.parent / 'seqcls'}: written; 3 labels\n"
    return guard


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The example's program, in this process, which has its libraries already; what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        with redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return printed.getvalue()

    return run


def test_transformers_and_peft_give_the_logits_of_the_guard(
    made: Path, tmp_path: Path, verify: Callable[..., str]
) -> None:
    assert "lora_guard" not in SCRIPT.read_text("utf-8")
    shown = verify(made.parent / "seqcls", made.parent / "base", "--base-out", tmp_path / "classifier")
    assert f"{len(conversations())} rows, 3 labels" in shown
    assert verify(made.parent / "seqcls", tmp_path / "classifier") == shown  # what vLLM is started from
    tensors = load_file(tmp_path / "classifier" / "model.safetensors")
    assert tensors["score.weight"].shape == (3, 32)


def test_other_weights_are_found_out(made: Path, tmp_path: Path, verify: Callable[..., str]) -> None:
    base = base_model.load(str(made.parent / "base")).model
    with torch.no_grad():
        base.get_decoder().norm.weight.mul_(1.01)
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="the logits differ"):
        verify(made.parent / "seqcls", tmp_path / "other")


def test_the_saved_calibration_gives_the_guards_verdicts_from_raw_logits(made: Path) -> None:
    calibration = read_spec(made.parent / "seqcls").calibration
    guard = Guard.load(made, precision="fp32")
    vectors = load_file(made.parent / "seqcls" / "test_vectors.safetensors")
    for conversation, (harmful, *categories) in zip(conversations(), vectors["logits"].tolist(), strict=True):
        found = calibration.verdict(GuardLogits(harmful, tuple(categories)), conversation.target)
        expected = guard.spec.calibration.verdict(
            guard.engine.score([conversation], [conversation.target])[0], conversation.target
        )
        assert found.score == pytest.approx(expected.score, abs=1e-5)
        for name, decision in expected.categories.items():
            assert found.categories[name].score == pytest.approx(decision.score, abs=1e-5)


@given(
    logit=st.floats(-50, 50),
    bias=st.floats(-50, 50),
    temperature=st.floats(0.05, 20),
    own=st.floats(-5, 5),
)
def test_a_bias_moves_into_the_calibration_whatever_its_size(
    made: Path, logit: float, bias: float, temperature: float, own: float
) -> None:
    calibration = read_spec(made).calibration
    head = Calibrator(temperature=temperature, bias=own, thresholds=calibration.prompt.harmful.thresholds)
    part = calibration.prompt.model_copy(update={"harmful": head})
    moved = peft_seqcls.without_bias(calibration.model_copy(update={"prompt": part}), torch.tensor([bias, 0.0, 0.0]))
    single = float(torch.tensor(bias))
    assert moved.prompt.harmful.score(logit) == pytest.approx(head.score(logit + single), abs=1e-9)


def test_the_form_is_what_vllm_asks_for(made: Path) -> None:
    config = json.loads((made.parent / "seqcls" / "adapter_config.json").read_text("utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert not config["use_dora"]
    tensors = load_torch_file(made.parent / "seqcls" / WEIGHTS_FILE)
    assert tensors["base_model.model.score.weight"].shape == (3, 32)
    lora = tensors.keys() - {"base_model.model.score.weight"}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in lora)


def test_it_is_no_guard_folder_and_cannot_be_exported_again(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is an export for sequence classification; allowed: a guard folder"):
        Guard.load(made.parent / "seqcls")
    words = ["export", str(tmp_path / "out"), "--guard", str(made.parent / "seqcls")]
    assert "is an export already" in CliRunner().invoke(app, words).output


@pytest.mark.parametrize("kind", ["alora", "none"])
def test_a_guard_that_is_no_plain_lora_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    guard = tiny_guard_folder(tmp_path, adapter_kind=kind)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "out"), "--guard", str(guard), "--to", "peft-seqcls"])
    assert result.exit_code == 1
    assert f"has adapter '{kind}'; allowed for peft-seqcls: 'lora'" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_the_highest_of_biased_categories_has_no_such_form(tmp_path: Path) -> None:
    guard = tiny_guard_folder(tmp_path)
    saved = artifact.read(guard)
    shape = saved.spec.heads.model_copy(update={"harmful": False})
    spec = saved.spec.model_copy(update={"heads": shape})
    base = base_model.load(str(tmp_path / "base"))
    other = artifact.Artifact(guard, spec, saved.adapter, saved.heads)
    with pytest.raises(ArtifactError, match="takes the highest category, biases included"):
        peft_seqcls.check(other, base.model)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_supported_type_of_model_has_the_form(tmp_path: Path, architecture: str) -> None:
    guard = tiny_guard_folder(tmp_path, architecture)
    peft_seqcls.check(artifact.read(guard), base_model.load(str(tmp_path / "base")).model)


@pytest.mark.parametrize("words", [["--check", "x"], ["OUT", "--model", "x.gguf"]])
def test_options_of_bundles_are_refused(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["export", *words, "--to", "peft-seqcls"])
    assert result.exit_code == 1
    assert "go with bundles for llama-cpp" in " ".join(result.output.split())


def test_a_guard_with_a_token_head_is_refused_in_one_line(tmp_path: Path) -> None:
    guard = tiny_guard_folder(tmp_path, token_head=True)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "out"), "--guard", str(guard), "--to", "peft-seqcls"])
    assert result.exit_code == 1
    assert "has a token head, for which peft-seqcls has no place" in " ".join(result.output.split())
