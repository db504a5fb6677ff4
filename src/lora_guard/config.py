"""Every setting of a training run: validated, read from YAML, overridden by ``key=value``, saved resolved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_guard.errors import ConfigError, allowed

Settings = TypeVar("Settings", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_WITHOUT_EFFECT = {
    "alora": set[str](),
    "lora": {"prefix_cache"},
    "none": {
        "prefix_cache",
        "activation_checkpointing",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "layers",
    },
}


class Source(_Strict):
    """One data file or hub data set."""

    path: str
    """A .jsonl, .csv or .parquet file, or ``hub:OWNER/NAME`` (BeaverTails form)."""
    split: str | None = None
    """The hub data set's split, such as ``30k_train``."""
    revision: str | None = None
    """The hub data set's revision."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field name -> the file's column: ``prompt``, ``response``, ``unsafe`` and category names."""
    only: dict[str, list[str]] = Field(default_factory=dict)
    """Columns of text and the words that they may hold; other rows are left out."""
    rows: int | None = Field(None, ge=1)
    """Use at most this many rows, drawn with the run's seed."""
    weight: float = Field(1.0, gt=0)
    """Rows of this source drawn per epoch, as a multiple of its size: 0.5 draws half, 2 draws each twice."""
    prompts_are: Literal["harmful", "harmless"] | None = None
    """Read the prompts alone, each once, all with this label; what the rows say of responses is left out."""
    category_column: str | None = None
    """A column that names the categories of a harmful row, one or a list, in any words."""
    category_names: dict[str, list[str]] = Field(default_factory=dict)
    """A word of that column -> our categories. Other words count if they are our categories, and say nothing if not."""
    names_every_category: bool = False
    """Whether a category that the column does not name is absent; unknown otherwise."""
    licence: str | None = None
    """The data's licence, for the model card."""

    @model_validator(mode="after")
    def _column_is_named(self) -> Self:
        if self.category_column is None and (self.category_names or self.names_every_category):
            raise ValueError(f"{self.path}: category_names and names_every_category need category_column")
        return self

    @property
    def name(self) -> str:
        """What metrics and cards call it: the file's stem or the hub data set's name."""
        return Path(self.path.removeprefix("hub:")).stem if not self.path.startswith("hub:") else self.path[4:]


class TrainConfig(_Strict):
    """A training run. Defaults follow the paper (arXiv 2407.02987) where it names a value."""

    # Base model and guard
    base_model: str = "default"
    """``default``, a hub id, a local folder or a .gguf file."""
    revision: str | None = None
    """The hub revision of the base model."""
    adapter: Literal["lora", "alora", "none"] = "lora"
    """``lora``: low-rank adapters that read the whole text, as in the paper; ``alora``: adapters that read only the
    invocation behind it, over the chat's own keys and values; ``none``: heads on the frozen features, the ablation."""
    invocation: str | None = None
    """Template text that ends every judged text. By default the end of a turn; with ``alora``, the marker of a turn of
    role ``guard`` too."""
    lora_r: int = Field(8, ge=1)
    lora_alpha: float = Field(16.0, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] = ["q_proj", "v_proj"]
    layers: list[int] | None = None
    """Decoder layers that get an adapter; all of them when absent."""
    head_bias: bool = True
    harmful_head: bool = True
    """Without it, harmfulness is the highest category (the paper's version 1)."""
    taxonomy: str = "beavertails"
    """``beavertails``, ``harmfulness`` (no categories), or a YAML/JSON file."""
    max_length: int = Field(1024, ge=32)
    """Tokens of one judged window."""
    start_from: str | None = None
    """A guard whose adapter and heads the run begins with: ``default``, ``commercial``, a folder or a hub id. Its base
    model, adapter, invocation, window, taxonomy and kind of heads need not be given; categories it lacks get fresh
    heads."""

    # Data
    data_root: str = "."
    """The folder that relative data paths start from."""
    train: list[Source] = Field(min_length=1)
    validation: list[Source] = []
    """Held-out files; without them a part of the training prompts is held out."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    test: list[Source] = []
    """Evaluated after each epoch, never used to choose anything."""
    keep_out: list[Source] = []
    """Files whose prompts no training row may have, and nothing more: test sets that no run is to be chosen by."""
    split: Literal["grouped", "paper"] = "grouped"
    """``grouped``: all rows of a prompt on one side; ``paper``: 24,672/2,514 by row."""
    eval_rows: int | None = Field(None, ge=1)
    """At most this many training rows in the evaluation after an epoch; the other sets are taken whole."""
    augment: float = Field(0.0, ge=0, le=1)
    """The probability that an epoch changes a training row's judged text: disguised, misspelt, framed, in small talk or
    cut short."""

    # Optimisation
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    """Rows of one optimizer step, over all processes."""
    micro_batch_size: int = Field(8, ge=1)
    """Rows of one forward pass on one process; the rest of the batch is accumulated."""
    learning_rate: float = Field(3e-4, gt=0)
    head_learning_rate: float | None = Field(None, gt=0)
    """For the heads; as ``learning_rate`` when absent."""
    weight_decay: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float | None = Field(1.0, gt=0)
    pos_weight_max: float | None = Field(20.0, ge=1)
    """Upper bound of negatives/positives; none when null."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of harmfulness: a row's label is 1 - s/2 or s/2 instead of 1 or 0, since some labels are wrong."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``bf16``: autocast over fp32 adapters; ``auto``: bf16 where the device computes it natively."""

    activation_checkpointing: bool = False
    """With ``lora``: a layer keeps its input alone for the backward pass, and is computed once more there."""
    prefix_cache: float = Field(16.0, ge=0)
    """With ``alora`` and several epochs: gigabytes on the disk for keys and values of the frozen part of the training
    texts, which are then computed once; 0 for none. What does not fit is computed anew in each epoch."""

    # The run
    seed: int = 0
    processes: int | None = Field(None, ge=1)
    """Refuse to run as any other number of processes."""
    state_every: int = Field(50, ge=1)
    """Optimizer steps between two resume states."""
    log_with: list[str] = []
    """Trackers of accelerate, such as ``tensorboard``; none unless named."""
    name: str | None = None
    """What the model card calls the guard; the run folder's name when absent."""
    licence: str | None = None
    """Licence of the trained weights, for the model card."""
    licence_file: str | None = None
    """A text file that goes with the weights as their LICENSE."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} exceeds batch_size {self.batch_size}; "
                "allowed: at most batch_size"
            )
        if self.split == "paper" and self.validation:
            raise ValueError("split 'paper' holds out its own validation rows; choose it or 'validation', not both")
        if self.split == "paper" and len(self.train) > 1:
            raise ValueError("split 'paper' takes one training source, BeaverTails 30k_train")
        names = ["train", "validation", *(source.name for source in self.test)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"test names {repeated[0]!r} twice, or as the run does; allowed: files of different names")
        if self.activation_checkpointing and self.adapter == "alora":
            raise ValueError(
                "activation_checkpointing would compute the kept keys and values of adapter 'alora' again; "
                "allowed with adapter 'lora'"
            )
        idle = sorted(_WITHOUT_EFFECT[self.adapter] & self.model_fields_set)
        decided = self.start_from is None or "adapter" in self.model_fields_set
        if idle and decided:
            raise ValueError(f"{idle[0]} has no effect with adapter {self.adapter!r}; choose one")
        return self

    @classmethod
    def load(cls, path: str | Path | None, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply ``key=value`` overrides (YAML values, dotted keys: ``train.0.weight=2``).

        Raises:
            ConfigError: no such file, not YAML, an unknown field, a bad value, contradictory fields.
        """
        return read(cls, path, overrides)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """The config with other values of some fields, checked as :meth:`load` does.

        Raises:
            ConfigError: they contradict the others.
        """
        try:
            return self.model_validate(self.model_dump(exclude_unset=True) | dict(values))
        except ValidationError as error:
            raise ConfigError(f"config: {_first_problem(type(self), error)}") from error

    def to_yaml(self) -> str:
        """The resolved config; :meth:`load` reads it back to an equal one."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def resolved(self) -> dict[str, Any]:
        """Every field that has an effect, as JSON has it."""
        return self.model_dump(mode="json", exclude=_WITHOUT_EFFECT[self.adapter])


def read(model: type[Settings], path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """A config of the given type from a YAML file, if there is one, and ``key=value`` overrides.

    Raises:
        ConfigError: no such file, not YAML, an unknown field, a bad value, contradictory fields.
    """
    raw: Any = {}
    if path is not None:
        raw = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path or 'config'}: {_first_problem(model, error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path} holds {type(raw).__name__}; allowed: a mapping of field: value")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` inside nested mappings and lists."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r} is not of the form key=value")
    *path, last = key.split(".")
    node: Any = raw
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        value = yaml.safe_load(text)
        if isinstance(value, str) and _is_number(value):
            value = float(value)  # YAML 1.1 reads 3e-4 as text
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {override!r}: no such place in the config ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_problem(model: type[BaseModel], error: ValidationError) -> str:
    """The first finding of pydantic as one line: field, value, what is allowed."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        fields = (Source if len(problem["loc"]) > 1 else model).model_fields
        return f"field {where!r} does not exist; {allowed(problem['loc'][-1], fields)}"
    if problem["type"] == "missing":
        return f"field {where!r} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    value = problem["input"]
    shown = "" if isinstance(value, Mapping) else f" has value {value!r}:"
    return f"field {where!r}{shown} {problem['msg'][0].lower()}{problem['msg'][1:]}"
