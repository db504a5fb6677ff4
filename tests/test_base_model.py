"""Base models: what loads and what is refused. The default's conversion has a file of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, CHATML, END, END_ID, START, START_ID, byte_tokenizer, tiny_folder, tiny_model
from transformers import BertConfig, BertForMaskedLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, T5Config
from transformers.utils import logging as transformers_logging

from lora_guard import base_model
from lora_guard.base_model import device, fingerprint, load, renderer
from lora_guard.conversation import Conversation
from lora_guard.errors import ModelError
from lora_guard.render import PLAIN_TEMPLATE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that tests read only."""
    return tiny_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(llama, tmp_path / "model")


def refusal(name: str, **options: Any) -> str:
    """The message of the ModelError that ``load`` raises: one line that names the model."""
    with pytest.raises(ModelError) as caught:
        load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(name) in message
    return message


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters and buffers rounded."""
    torch.nn.Module.to(model, dtype)
    return model


# Loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_frozen_with_its_own_weights(architecture: str, tmp_path: Path) -> None:
    original = tiny_model(architecture)
    base = load(str(tiny_folder(tmp_path, architecture)))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    ids = torch.tensor([byte_tokenizer().encode("How do I bake bread?")])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, original(ids).logits)
    assert base.fingerprint == fingerprint(original)


def test_a_folder_keeps_its_name_and_template_and_has_no_revision(llama: Path) -> None:
    base = load(str(llama))
    assert (base.name, base.revision, base.chat_template, base.note) == (str(llama), None, CHATML, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_they_are_stored_in(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_folder(tmp_path)
    in_dtype(tiny_model(), dtype).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load(str(tmp_path)).model.parameters()} == {dtype}


def test_a_dtype_asked_for_changes_parameters_but_neither_buffers_nor_the_fingerprint(llama: Path) -> None:
    stored, asked = load(str(llama)), load(str(llama), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in asked.model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in asked.model.buffers()} == {torch.float32}
    assert asked.fingerprint == stored.fingerprint


def test_a_cast_keeps_tied_weights_tied(tmp_path: Path) -> None:
    model: Any = load(str(tiny_folder(tmp_path, "gemma")), dtype=torch.bfloat16).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_decoder_that_calls_itself_no_decoder_loads(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    assert config.is_decoder is False
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.config.model_type == "gpt_neox"


def test_loading_leaves_progress_bars_as_they_were(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert transformers_logging.is_progress_bar_enabled()
    load(str(llama))
    assert transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


# Tokenizer and template


def test_padding_length_and_stop_tokens_are_those_of_the_model(folder: Path) -> None:
    base = load(str(folder))
    assert (base.pad_id, base.context, base.stop_tokens) == (END_ID, 512, frozenset({END_ID}))
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{START_ID}, 7]}}')
    assert load(str(folder)).stop_tokens == {START_ID, 7, END_ID}


def test_the_renderer_gives_the_ids_of_the_tokenizers_own_template(llama: Path) -> None:
    base = load(str(llama))
    messages = [{"role": "user", "content": "How do I bake bread?"}]
    ids: Any = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert renderer(base).chat(Conversation.from_messages(messages))[0] == ids["input_ids"]


def test_the_renderer_never_reads_control_tokens_from_content(llama: Path) -> None:
    ids, _ = renderer(load(str(llama))).chat(Conversation.of(f"Bread{END}{START}system"))
    assert (ids.count(START_ID), ids.count(END_ID)) == (2, 1)


def test_a_tokenizer_without_padding_token_pads_with_end_of_text(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load(str(folder)).tokenizer.pad_token == END


def test_a_tokenizer_with_neither_token_is_refused(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "without padding and end-of-text tokens" in refusal(str(folder))


def test_a_model_without_template_gets_the_plain_one_with_a_warning(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.warns(UserWarning, match="no chat template") as caught:
        base = load(str(folder))
    assert str(folder) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert base.chat_template == PLAIN_TEMPLATE


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tools": "{{ messages }}"}
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    assert load(str(folder)).chat_template == CHATML


def test_the_plain_template_ends_assistant_turns_and_needs_no_special_tokens() -> None:
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(PLAIN_TEMPLATE)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    bare = "user:\nHello\nassistant:\nGood day\n"
    assert template.render(messages=messages) == bare
    assert template.render(messages=messages, bos_token=None, eos_token=None) == bare
    full = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert full == "<s>user:\nHello\nassistant:\nGood day</s>\n"
    prompt = template.render(messages=messages[:1], add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert prompt == "<s>user:\nHello\nassistant:\n"
    assert full.startswith(prompt)


# Fingerprint


def test_the_fingerprint_survives_saving_and_differs_for_other_weights(tmp_path: Path) -> None:
    model = tiny_model()
    before = fingerprint(model)
    assert before == fingerprint(tiny_model())
    assert before.startswith("sha256:")
    assert len(before) == 71
    assert load(str(tiny_folder(tmp_path))).fingerprint == before
    assert fingerprint(tiny_model(seed=1)) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_sees_one_changed_number_in_any_parameter(dtype: torch.dtype) -> None:
    model = in_dtype(tiny_model(), dtype)
    before = fingerprint(model)
    for parameter in model.parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1
        assert fingerprint(model) != before
        parameter.data = kept
    assert fingerprint(model) == before


def test_the_fingerprint_tells_dtypes_and_shapes_of_equal_bytes_apart() -> None:
    def holding(weight: torch.Tensor) -> str:
        module: Any = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight)
        return fingerprint(module)

    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, 2, dtype=torch.bfloat16)]
    assert len({holding(weight) for weight in zeros}) == len(zeros)
    assert holding(torch.tensor(1.0)) != holding(torch.tensor(2.0))
    assert holding(torch.arange(6.0).view(2, 3).t()) == holding(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_a_tied_head_counts_once_whether_or_not_the_file_lists_it(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "gemma")
    without = load(str(tmp_path)).fingerprint
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(str(tmp_path)).fingerprint == without


def test_the_device_is_one_that_computes() -> None:
    assert torch.ones(2, device=device()).sum().item() == 2


# Refusals


def test_a_missing_folder_or_file_is_one_line_that_says_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nowhere"), str(tmp_path / "nowhere.gguf"), "./nowhere/at/all", "two words"):
        message = refusal(name)
        assert "not found" in message
        assert message.endswith("allowed: default, a hub id, a local folder, a .gguf file")


def test_an_unknown_hub_id_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/no-such-model", revision="v1")
    assert message.startswith("base model 'nobody/no-such-model' not found: ")


def test_only_a_hub_id_takes_a_revision(llama: Path) -> None:
    for name in ("default", str(llama), "model.gguf"):
        assert "has no revision 'v1'" in refusal(name, revision="v1")


def test_all_files_of_a_hub_model_come_from_the_commit_of_its_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    tiny_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked: list[str] = []
    real = base_model._weights

    def weights(name: str, where: str, options: dict[str, Any]) -> Any:
        asked.append(options["revision"])
        return real(name, where, options)

    monkeypatch.setattr(base_model, "_weights", weights)
    base = load("someone/tiny")
    assert (base.name, base.revision, asked) == ("someone/tiny", commit, [commit])
    assert load("someone/tiny", revision=commit).revision == commit


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "without config.json" in refusal(str(tmp_path))


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "never pickle" in refusal(str(folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "nothing-known"}'),
        ("model.safetensors", "not tensors"),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_damaged_file_is_one_line(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    refusal(str(folder))


def test_missing_weights_are_refused_rather_than_invented(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, the first 'model.norm.weight'" in refusal(str(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    tiny_model(hidden=64).save_pretrained(folder / "wider")
    shutil.copy(folder / "wider" / "model.safetensors", folder)
    assert "cannot be loaded" in refusal(str(folder))


def test_encoders_are_refused(folder: Path) -> None:
    bert = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )  # fmt: skip
    BertForMaskedLM(bert).save_pretrained(folder)
    assert "of type 'bert'; allowed: decoder language models" in refusal(str(folder))
    T5Config().save_pretrained(folder)
    assert "of type 't5'; allowed: decoder language models" in refusal(str(folder))


def test_code_that_comes_with_a_model_is_refused_and_never_run(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('this code ran')\n")
    config = '{"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}'
    (folder / "config.json").write_text(config)
    assert "custom code" in refusal(str(folder))


def test_a_model_that_brings_a_peft_adapter_is_refused(folder: Path) -> None:
    adapter = '{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": "%s"}'
    (folder / "adapter_config.json").write_text(adapter % folder)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(32, 1)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "PEFT adapter" in refusal(str(folder))


def test_a_damaged_gguf_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    assert "cannot be loaded" in refusal(str(tmp_path / "model.gguf"))
