"""The public names are a fixed list, and each is there."""

import subprocess
import sys

import pytest

import lora_guard

PUBLIC = [
    "ChatEnd",
    "Check",
    "Conversation",
    "Guard",
    "LoraGuardError",
    "Message",
    "StreamSettings",
    "Taxonomy",
    "TrainConfig",
    "Verdict",
    "__version__",
]


def test_the_public_names_are_these() -> None:
    assert lora_guard.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_name_resolves_to_what_it_is_called(name: str) -> None:
    value = getattr(lora_guard, name)
    if name == "__version__":
        assert value[0].isdigit()
    else:
        assert value.__name__ == name
        assert value.__module__.startswith("lora_guard.")


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(lora_guard))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lora_guard' has no attribute 'nothing'"):
        _ = lora_guard.nothing  # type: ignore[attr-defined]


def test_python_m_runs_the_command_line() -> None:
    result = subprocess.run([sys.executable, "-m", "lora_guard", "--help"], capture_output=True, text=True, check=True)
    assert "moderate" in result.stdout
