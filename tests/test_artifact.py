"""A guard folder is read whole or refused in one line: nothing missing, extra, corrupted or made for another base."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guards import tiny_guard_folder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from lora_guard import Conversation, Guard, adapter, base_model, files
from lora_guard.artifact import CONFIG_FILE, HEADS_FILE, SPEC_FILE, WEIGHTS_FILE
from lora_guard.engine.torch_guard import save
from lora_guard.errors import ArtifactError, LoraGuardError

PROMPT = Conversation.of("How do I bake bread?")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "guard"))


def refusal(folder: Path, **options: Any) -> str:
    """The one line that refuses a folder."""
    with pytest.raises(LoraGuardError) as caught:
        Guard.load(folder, **options)
    assert isinstance(caught.value, ArtifactError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_spec(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    spec = json.loads((folder / SPEC_FILE).read_text("utf-8"))
    change(spec)
    (folder / SPEC_FILE).write_text(json.dumps(spec), "utf-8")


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a tensor file and the hash that would give the change away."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change_spec(folder, lambda spec: spec["files"].__setitem__(name, digest))


def test_a_saved_guard_is_read_back_and_scores_the_same(original: Path) -> None:
    scores = {Guard.load(original, precision="fp32").moderate(PROMPT).score for _ in range(2)}
    assert len(scores) == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21's own call
def test_peft_reads_the_adapter_and_gives_the_same_features(original: Path) -> None:
    guard = Guard.load(original, precision="fp32")
    theirs = PeftModel.from_pretrained(base_model.load(str(original.parent / "base")).model, str(original))
    ids = torch.tensor([guard.engine.renderer.judged(PROMPT, "prompt", guard.spec.invocation).ids])
    model = guard.engine.model
    with torch.inference_mode(), adapter.switched(model.base, model.adapter):
        ours = model.features(ids, torch.ones_like(ids))
        expected = theirs.get_base_model().get_decoder()(input_ids=ids)[0][:, -1]
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_guard_without_adapter_has_no_adapter_files(tmp_path: Path) -> None:
    folder = tiny_guard_folder(tmp_path, adapter_kind="none")
    assert not list(folder.glob("adapter*"))
    assert 0 <= Guard.load(folder).moderate(PROMPT).score <= 1


@pytest.mark.parametrize("name", [HEADS_FILE, WEIGHTS_FILE, CONFIG_FILE, SPEC_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [HEADS_FILE, WEIGHTS_FILE, CONFIG_FILE])
def test_a_changed_or_truncated_file_is_found_by_its_hash(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-7])
    assert "is corrupted" in refusal(folder)
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "is corrupted" in refusal(folder)


@pytest.mark.parametrize("name", [HEADS_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(min(tensors)), "lacks 1 tensors"),
        (lambda tensors: tensors.__setitem__("more", torch.zeros(1)), "has 1 unknown tensors, the first 'more'"),
        (lambda tensors: tensors.__setitem__(min(tensors), torch.zeros(1, 1)), "has shape"),
        (lambda tensors: tensors[min(tensors)].fill_(float("nan")), "NaN or infinite"),
        (lambda tensors: tensors[min(tensors)].fill_(float("inf")), "NaN or infinite"),
    ],
)
def test_every_key_shape_and_value_is_checked(
    folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    change_tensors(folder, name, change)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.update(format_version=9), "format_version is 9; allowed: 2"),
        (lambda spec: spec.update(render_version=9), "render_version is 9; allowed: 1"),
        (lambda spec: spec.update(surprise=1), "surprise"),
        (lambda spec: spec.pop("invocation"), "invocation"),
        (lambda spec: spec["calibration"]["prompt"]["harmful"]["thresholds"].update(strict=7), "thresholds.strict"),
        (lambda spec: spec["calibration"]["response"]["categories"]["a"]["thresholds"].pop("strict"), "'policies'"),
        (lambda spec: spec["calibration"].update(default_policy="strct"), "did you mean 'strict'"),
        (lambda spec: spec["calibration"]["prompt"]["categories"].pop("b"), "have other categories"),
        (lambda spec: spec["calibration"]["policies"]["strict"].update(rule="target_fpr"), "allowed: a rate with"),
        (lambda spec: spec["taxonomy"]["categories"].append("c"), "name other categories"),
        (lambda spec: spec["files"].pop(HEADS_FILE), "'files' lists"),
        (lambda spec: spec["base"].update(hidden_size=7), "is for features of 7"),
    ],
)
def test_a_spec_of_another_form_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    change_spec(folder, change)
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 2}'])
def test_a_spec_that_is_no_spec_is_refused(folder: Path, text: str) -> None:
    (folder / SPEC_FILE).write_text(text, "utf-8")
    assert SPEC_FILE in refusal(folder)


def test_another_base_is_refused_unless_the_caller_insists(folder: Path, tmp_path: Path) -> None:
    other = str(tiny_folder(tmp_path / "other", seed=5))
    assert "was trained on weights sha256:" in refusal(folder, base=other)
    assert 0 <= Guard.load(folder, base=other, allow_other_base=True).moderate(PROMPT).score <= 1


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    assert "allowed: default, commercial, a folder, a hub id" in refusal(Path("nobody/nothing"))
    assert "not found: no such folder" in refusal(tmp_path / "missing")
    assert "is not a guard" in refusal(tmp_path)


def test_a_run_folder_stands_for_its_guard(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "guard")
    assert Guard.load(tmp_path).spec.name == "tiny"


def test_a_write_that_fails_leaves_the_old_guard_and_no_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    guard = Guard.load(folder)

    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        save(guard.engine.model, guard.spec, folder, card="")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["guard"]
