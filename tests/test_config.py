"""A config is checked field by field: one line says what is wrong, where, and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_guard import TrainConfig
from lora_guard.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"

MINIMAL = {"train": [{"path": "rows.jsonl"}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), "utf-8")
    return path


def load(tmp_path: Path, **fields: Any) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | fields), "utf-8")
    return TrainConfig.load(path)


def test_the_defaults_are_the_papers(file: Path) -> None:
    config = TrainConfig.load(file)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.learning_rate == 3e-4


def test_the_resolved_config_is_read_back_to_the_same(file: Path, tmp_path: Path) -> None:
    config = TrainConfig.load(file, ["epochs=3", "layers=[1, 2]", "train.0.weight=0.5"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(config.to_yaml(), "utf-8")
    assert TrainConfig.load(saved) == config
    assert set(yaml.safe_load(config.to_yaml())) == set(TrainConfig.model_fields) - {"prefix_cache"}  # lora


def test_any_field_can_be_set_on_the_command_line(file: Path) -> None:
    overrides = ["learning_rate=3e-4", "train.0.rows=7", "target_modules=[a, b]", "max_grad_norm=null", "name=x=y"]
    config = TrainConfig.load(file, overrides)
    assert config.learning_rate == 3e-4
    assert config.train[0].rows == 7
    assert config.target_modules == ["a", "b"]
    assert config.max_grad_norm is None
    assert config.name == "x=y"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "field 'learning_rat' does not exist; did you mean 'learning_rate'"),
        ({"train": [{"path": "a", "wieght": 2}]}, "field 'train.0.wieght' does not exist; did you mean 'weight'"),
        ({"lora_r": 0}, "field 'lora_r' has value 0: input should be greater than or equal to 1"),
        ({"adapter": "lira"}, "field 'adapter' has value 'lira': input should be 'lora', 'alora' or 'none'"),
        ({"train": []}, "field 'train'"),
        ({"train": [{"weight": 1}]}, "field 'train.0.path' is missing"),
        ({"micro_batch_size": 32}, "micro_batch_size 32 exceeds batch_size 16"),
        ({"split": "paper", "validation": [{"path": "v"}]}, "choose it or 'validation', not both"),
        ({"split": "paper", "train": [{"path": "a"}, {"path": "b"}]}, "takes one training source"),
        ({"test": [{"path": "a/x.jsonl"}, {"path": "b/x.csv"}]}, "test names 'x' twice"),
        ({"test": [{"path": "validation.jsonl"}]}, "test names 'validation' twice, or as the run does"),
        ({"adapter": "none", "lora_r": 4}, "lora_r has no effect with adapter 'none'; choose one"),
        ({"adapter": "none", "layers": [1]}, "layers has no effect with adapter 'none'"),
        ({"adapter": "lora", "prefix_cache": 1}, "prefix_cache has no effect with adapter 'lora'"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["novalue", "=3", "train.x.rows=1", "train.9.rows=1", "epochs.deep=1", "a=[", "epochs=x"]
)
def test_a_bad_override_is_one_line(file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "a: [", "just text", "\x00"])
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("adapter", ["lora", "alora", "none"])
def test_a_resolved_config_is_read_back_whatever_the_adapter(tmp_path: Path, adapter: str) -> None:
    config = load(tmp_path, adapter=adapter)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(), "utf-8")
    assert TrainConfig.load(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*.yaml")])
def test_the_configs_of_the_repository_are_valid(name: str) -> None:
    TrainConfig.load(CONFIGS / f"{name}.yaml")
