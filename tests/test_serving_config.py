"""The server's settings: safe by default, and refused where they would open it to others unguarded."""

from pathlib import Path

import pytest

from lora_guard.errors import ConfigError
from lora_guard.serving.config import KEYS_VARIABLE, ServeConfig


def test_the_default_is_reachable_from_this_machine_alone() -> None:
    config = ServeConfig()
    assert config.is_local
    assert config.keys() == ()
    assert "*" not in config.hosts
    assert not config.fail_open


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "guard.example.org"])
def test_without_keys_no_other_machine_may_reach_it(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="allowed without API keys: 127"):
        ServeConfig(host=host).keys()


def test_keys_come_from_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "one, two")
    file = tmp_path / "keys"
    file.write_text("# staging\nthree\n\n")
    assert ServeConfig(host="0.0.0.0", api_keys_file=file).keys() == ("one", "two", "three")


@pytest.mark.parametrize(
    ("content", "message"), [("# none\n", "holds no key"), (None, "cannot be read"), ("a b\n", "visible ASCII")]
)
def test_a_bad_key_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        ServeConfig(api_keys_file=file).keys()
    assert "\n" not in str(error.value)


def test_a_file_and_overrides_are_read(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\noutput_mode: block\n")
    config = ServeConfig.load(file, ["port=9001", "chats=2"])
    assert (config.port, config.output_mode, config.chats) == (9001, "block", 2)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("ports=1", "did you mean 'port'?"),
        ("output_mode=blok", "output_mode"),
        ("max_completion_tokens=8", "default_completion_tokens 256 exceeds max_completion_tokens 8"),
        ("queue=0", "greater than or equal to 1"),
    ],
)
def test_a_bad_setting_is_one_line(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServeConfig.load(None, [override])
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_every_setting_is_documented_with_its_default() -> None:
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text("utf-8")
    for name, field in ServeConfig.model_fields.items():
        default = "none" if field.default is None else str(field.default)
        assert f"| `{name}` | {default.lower() if isinstance(field.default, bool) else default} | " in page
