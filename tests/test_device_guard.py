"""A guard starts on a GGUF file without torch; what does not belong together is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf
from typer.testing import CliRunner

from lora_guard import Conversation, Guard, artifact, base_model
from lora_guard.cli import app
from lora_guard.errors import ArtifactError, InputError, ModelError
from lora_guard.export import bundle
from lora_guard.export.adapter_gguf import BaseShape

llama_cpp = pytest.importorskip("lora_guard.engine.llama_cpp", reason="needs the extra 'device'", exc_type=ModelError)
pytestmark = pytest.mark.extras


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A guard folder and its base's GGUF file."""
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    guard = tiny_guard_folder(tmp_path, adapter_kind="alora", max_length=400, strength=0.005, token_head=True)
    file = tiny_gguf(tmp_path / "base.gguf", base_model.load(str(tmp_path / "base")).model)
    return guard, file


def test_a_guard_folder_becomes_a_bundle_in_the_cache_once(made: tuple[Path, Path], tmp_path: Path) -> None:
    guard, file = made
    first = Guard.load(guard, engine="llama-cpp", base=str(file))
    bundles = [path for path in (tmp_path / "cache" / "bundles").iterdir() if path.is_dir()]
    (bundle,) = bundles
    written = (bundle / "adapter.gguf").stat().st_mtime_ns
    second = Guard.load(guard, engine="llama-cpp", base=str(file))
    assert (bundle / "adapter.gguf").stat().st_mtime_ns == written
    text = Conversation.of("How do I bake bread?")
    assert first.moderate(text) == second.moderate(text)
    assert Guard.load(bundle, engine="llama-cpp", base=str(file)).moderate(text) == first.moderate(text)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Labelled prompts and responses."""
    path = tmp_path / "rows.jsonl"
    made = [{"prompt": f"question {n} " + "x" * (n % 7), "unsafe": n % 3 == 0} for n in range(48)]
    path.write_text(
        "".join(json.dumps(row | ({"response": "y" * n} if n % 2 else {})) + "\n" for n, row in enumerate(made))
    )
    return path


def calibrate(*words: object) -> Any:
    return CliRunner().invoke(app, ["calibrate", "--engine", "llama-cpp", *map(str, words)])


def test_a_guard_is_calibrated_on_the_device_engine_into_a_bundle_that_every_command_reads(
    made: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    guard, file = made
    out, quantised = tmp_path / "out", tmp_path / "q8.gguf"
    llama_cpp.quantise(file, quantised, "Q8_0")
    words = ["--base", quantised, "--data", rows, "--out", out, "--target-fpr", "0.25"]
    result = calibrate("--guard", guard, *words)
    assert result.exit_code == 0, result.output
    assert f"{out} has no test vectors" in result.stdout
    assert (
        "has no test_vectors.safetensors"
        in CliRunner().invoke(app, ["export", "--check", str(out), "--model", str(quantised)]).stderr
    )
    loaded = Guard.load(out, engine="llama-cpp", base=str(quantised))
    assert loaded.spec.provenance["calibration"]["base"] == loaded.base_fingerprint
    assert loaded.spec.calibration.prompt.harmful.fitted_on != "nothing"
    labelled = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    verdicts = loaded.moderate([Conversation.of(row["prompt"], row.get("response")) for row in labelled])
    harmless = [
        (verdict.target, verdict.flagged) for verdict, row in zip(verdicts, labelled, strict=True) if not row["unsafe"]
    ]
    for target in ("prompt", "response"):
        flags = [flagged for of, flagged in harmless if of == target]
        assert sum(flags) <= 0.25 * len(flags)
    options = ["--engine", "llama-cpp", "--guard", str(out), "--base", str(quantised)]
    row = next(row for row in labelled if "response" not in row)
    judged = CliRunner().invoke(app, ["moderate", *options, "--prompt", row["prompt"], "--json"])
    assert json.loads(judged.stdout)["threshold"] == loaded.spec.calibration.prompt.harmful.thresholds["balanced"]
    evaluated = CliRunner().invoke(
        app, ["eval", *options, "--data", str(rows), "--resamples", "10", "--out", str(tmp_path / "eval")]
    )
    assert evaluated.exit_code == 0, evaluated.output


def test_a_bundle_calibrated_in_its_place_keeps_its_files_and_its_test_vectors(
    made: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    guard, file = made
    out = tmp_path / "bundle"
    words = ["export", str(out), "--guard", str(guard), "--model", str(file)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    flags = own_flags(out, file)
    result = calibrate("--guard", out, "--base", file, "--data", rows, "--out", out)
    assert result.exit_code == 0, result.output
    assert "test vectors" not in result.stdout
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"guard.json", "README.md"}
    assert after.keys() == before.keys()
    assert all(part in after["README.md"].decode() for part in ("## Measured", "## Calibration", "`rows.jsonl`"))
    assert own_flags(out, file) == flags


def own_flags(bundle: Path, file: Path) -> str:
    """What a check says of the verdicts of the guard's own model."""
    table = CliRunner().invoke(app, ["export", "--check", str(bundle), "--model", str(file)]).stdout
    assert "| test vectors | 108 |" in table
    return next(line for line in table.splitlines() if "own model that are flags" in line)


def test_a_calibration_on_another_model_makes_no_guard_of_that_model(
    made: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    guard, _ = made
    model = base_model.load(str(tmp_path / "base")).model
    with torch.no_grad():
        model.get_decoder().norm.weight += 0.1
    other, out = tiny_gguf(tmp_path / "other.gguf", model), tmp_path / "out"
    result = calibrate("--guard", guard, "--base", other, "--allow-other-base", "--data", rows, "--out", out)
    assert result.exit_code == 0, result.output
    assert artifact.read_spec(out).base == artifact.read_spec(guard).base
    with pytest.raises(ArtifactError, match="has other norms"):
        Guard.load(out, engine="llama-cpp", base=str(other))


def test_a_quantised_model_is_written_in_fp32_too(made: tuple[Path, Path], tmp_path: Path) -> None:
    for source, kind in ((made[1], "Q8_0"), (tmp_path / "Q8_0.gguf", "F32")):
        llama_cpp.quantise(source, tmp_path / f"{kind}.gguf", kind)
        assert llama_cpp.Model(tmp_path / f"{kind}.gguf").file_type == llama_cpp.file_type_number(kind)
    assert llama_cpp.file_type_number("F32") == llama_cpp.F32
    with pytest.raises(ModelError, match=r"'F33' is unknown to llama\.cpp"):
        llama_cpp.file_type_number("F33")


def test_an_export_replaces_nothing_but_a_bundle(made: tuple[Path, Path], tmp_path: Path) -> None:
    guard, _ = made
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    for out in (tmp_path / "notes", guard):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for form in ("llama-cpp", "peft-seqcls"):
            refused = CliRunner().invoke(app, ["export", str(out), "--guard", str(guard), "--to", form])
            assert refused.exit_code == 1
            assert "allowed: a new folder, or" in refused.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_calibration_never_replaces_a_guard_of_the_other_engine(
    made: tuple[Path, Path], rows: Path, tmp_path: Path
) -> None:
    guard, file = made
    before = {path.name: path.read_bytes() for path in guard.iterdir()}
    refused = calibrate("--guard", guard, "--base", file, "--data", rows, "--out", guard)
    assert refused.exit_code == 1
    assert "holds a guard folder; allowed: a new folder, or a bundle" in refused.stderr
    assert {path.name: path.read_bytes() for path in guard.iterdir()} == before
    calibrate("--guard", guard, "--base", file, "--data", rows, "--out", tmp_path / "bundle")
    words = ["calibrate", "--guard", str(guard), "--data", str(rows), "--out", str(tmp_path / "bundle")]
    assert "holds a bundle; allowed: a new folder, or a guard" in CliRunner().invoke(app, words).stderr


def test_neither_torch_nor_transformers_is_imported(made: tuple[Path, Path]) -> None:
    guard, file = made
    words = ["lora-guard", "moderate", "--engine", "llama-cpp", "--guard", str(guard), "--base", str(file)]
    program = (
        f"import atexit, sys\nsys.argv = {[*words, '--prompt', 'Hello']!r}\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from lora_guard.cli import main\nmain()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Hello" in result.stdout
    loaded = result.stderr.split()
    assert "llama_cpp" in loaded
    assert {"torch", "transformers", "peft", "sklearn", "datasets"}.isdisjoint(loaded)


def test_a_file_of_another_model_is_refused(made: tuple[Path, Path]) -> None:
    guard, file = made
    spec = json.loads((guard / "guard.json").read_text("utf-8"))
    for found, message in (("sha256:0", "has other norms"), (None, "does not say how to recognise its base")):
        spec["base"]["norms"] = found
        (guard / "guard.json").write_text(json.dumps(spec), "utf-8")
        with pytest.raises(ArtifactError, match=message):
            Guard.load(guard, engine="llama-cpp", base=str(file))
        Guard.load(guard, engine="llama-cpp", base=str(file), allow_other_base=True)


def test_scores_that_are_kept_belong_to_the_very_weights_that_gave_them(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    guard, file = made
    model = base_model.load(str(tmp_path / "base")).model
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.001)
    tuned = tiny_gguf(tmp_path / "tuned.gguf", model)
    first, other = (Guard.load(guard, engine="llama-cpp", base=str(base)) for base in (file, tuned))
    assert tuned.stat().st_size == file.stat().st_size
    assert first.base_fingerprint != other.base_fingerprint


def test_another_invocation_is_refused(made: tuple[Path, Path]) -> None:
    guard, file = made
    spec = json.loads((guard / "guard.json").read_text("utf-8"))
    spec["invocation"] += "x"
    (guard / "guard.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ArtifactError, match="the adapter's invocation is"):
        Guard.load(guard, engine="llama-cpp", base=str(file))


def test_what_is_no_chat_model_in_a_gguf_file_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    guard, _ = made
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing behind it")
    for base in (str(tmp_path / "base"), str(tmp_path / "missing.gguf"), None):
        with pytest.raises(ModelError, match="is no GGUF file; allowed with engine 'llama-cpp': default"):
            Guard.load(guard, engine="llama-cpp", base=base)
    with pytest.raises(ModelError, match=r"broken\.gguf' cannot be loaded"):
        Guard.load(guard, engine="llama-cpp", base=str(tmp_path / "broken.gguf"))


def test_settings_of_the_torch_engine_and_unknown_engines_are_refused(made: tuple[Path, Path]) -> None:
    guard, file = made
    with pytest.raises(InputError, match="belong to the torch engine"):
        Guard.load(guard, engine="llama-cpp", base=str(file), bulk=True)
    with pytest.raises(InputError, match="engine 'llama' is unknown; did you mean 'llama-cpp'"):
        Guard.load(guard, engine="llama")  # type: ignore[arg-type]


def test_a_bundle_with_test_vectors_learns_no_other_words(made: tuple[Path, Path], rows: Path, tmp_path: Path) -> None:
    guard, file = made
    exported = tmp_path / "bundle"
    norms = artifact.read_spec(guard).base.norms
    bundle.write(exported, guard, BaseShape("llama", 2, 4, 2), norms=norms, vectors={"ids": np.arange(3)})
    config = tmp_path / "train.yaml"
    config.write_text(f"train: [{{path: {rows}}}]\n", "utf-8")
    words = ["--guard", exported, "--base", file, "--data", rows, "--learn-tokens", config, "--out", tmp_path / "out"]
    result = calibrate(*words)
    assert result.exit_code == 1
    assert "has test vectors, which are those of its own token head or of none" in " ".join(result.stderr.split())
