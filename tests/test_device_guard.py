"""A guard starts on a GGUF file without torch; what does not belong together is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from guards import tiny_guard_folder
from tiny_gguf import tiny_gguf

from lora_guard import Conversation, Guard, base_model
from lora_guard.errors import ArtifactError, InputError, ModelError

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A guard folder and its base's GGUF file."""
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))
    guard = tiny_guard_folder(tmp_path, adapter_kind="alora")
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
