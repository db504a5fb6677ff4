"""The resume state: what was saved comes back to the bit, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from lora_guard import files
from lora_guard.errors import ArtifactError, ResourceError
from lora_guard.training.state import load_state, save_state

Parameters = dict[str, torch.nn.Parameter]


def trained(seed: int, steps: int = 2, width: int = 3) -> tuple[Parameters, AdamW]:
    """Two parameters after some steps."""
    torch.manual_seed(seed)
    parameters = {name: torch.nn.Parameter(torch.randn(width)) for name in ("adapter", "heads")}
    optimizer = AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter**3).sum() for parameter in parameters.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    return parameters, optimizer


def advance(parameters: Parameters, optimizer: AdamW) -> None:
    optimizer.zero_grad()
    sum((parameter**3).sum() for parameter in parameters.values()).backward()  # type: ignore[union-attr]
    optimizer.step()


def state_folder(run: Path) -> Path:
    (folder,) = (run / "state").iterdir()
    return folder


def test_a_loaded_state_continues_to_the_bit(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    save_state(tmp_path, 2, parameters, optimizer, "rows")
    others, other_optimizer = trained(1)
    assert load_state(tmp_path, others, other_optimizer, "rows") == 2
    for _ in range(3):
        advance(parameters, optimizer)
        advance(others, other_optimizer)
    assert all(torch.equal(parameter, others[name]) for name, parameter in parameters.items())


def test_a_fresh_optimizer_takes_the_moments_too(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    save_state(tmp_path, 2, parameters, optimizer, "rows")
    others, fresh = trained(0, steps=0)
    load_state(tmp_path, others, fresh, "rows")
    advance(parameters, optimizer)
    advance(others, fresh)
    assert all(torch.equal(parameter, others[name]) for name, parameter in parameters.items())


def test_there_is_nothing_to_load_before_the_first_state(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    assert load_state(tmp_path, parameters, optimizer, "rows") == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_one_state_is_kept_and_it_is_the_last(tmp_path: Path) -> None:
    parameters, optimizer = trained(0)
    for step in (2, 10, 9_999_999):
        save_state(tmp_path, step, parameters, optimizer, "rows")
        assert load_state(tmp_path, parameters, optimizer, "rows") == step
        assert len(list((tmp_path / "state").iterdir())) == 1


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    save_state(tmp_path, 2, *trained(0), "rows", main=False)
    assert not list(tmp_path.iterdir())


def test_a_state_holds_no_pickle(tmp_path: Path) -> None:
    save_state(tmp_path, 2, *trained(0), "rows")
    assert {path.suffix for path in state_folder(tmp_path).iterdir()} == {".safetensors", ".json"}


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = trained(0)
    save_state(tmp_path, 2, parameters, optimizer, "rows")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(ResourceError, match="no space left"):
            save_state(tmp_path, 4, parameters, optimizer, "rows")
    assert load_state(tmp_path, parameters, optimizer, "rows") == 2


def test_a_state_of_other_rows_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 2, *trained(0), "rows")
    with pytest.raises(ArtifactError, match="written for other training rows"):
        load_state(tmp_path, *trained(0), "others")


@pytest.mark.parametrize("file", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, file: str) -> None:
    save_state(tmp_path, 2, *trained(0), "rows")
    for damage in (lambda path: path.write_bytes(b"no"), Path.unlink):
        damage(state_folder(tmp_path) / file)
        with pytest.raises(ArtifactError, match=r"cannot be resumed from: .*; delete it to start anew"):
            load_state(tmp_path, *trained(0), "rows")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 2, *trained(0, width=1), "rows")
    with pytest.raises(ArtifactError, match=r"shape \[1\] where the model has \[3\]"):
        load_state(tmp_path, *trained(0), "rows")
    folder = state_folder(tmp_path)
    values = load_file(folder / "parameters.safetensors")
    del values["heads"]
    save_file(values, folder / "parameters.safetensors")
    with pytest.raises(ArtifactError, match="cannot be resumed from: 'heads'"):
        load_state(tmp_path, *trained(0, width=1), "rows")


def test_a_state_without_its_step_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 2, *trained(0), "rows")
    (state_folder(tmp_path) / "state.json").write_text(json.dumps({"rows": "rows"}), "utf-8")
    with pytest.raises(ArtifactError, match="cannot be resumed from"):
        load_state(tmp_path, *trained(0), "rows")
