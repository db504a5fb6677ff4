"""Activated LoRA: the guard reads the chat's own keys and values, and is PEFT's aLoRA in features and gradients."""

from pathlib import Path

import pytest
import torch
from guards import tiny_guard_folder
from peft import PeftModel
from tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM

from lora_guard import Conversation, Guard, adapter
from lora_guard.model import pad

PROMPT = Conversation.of("How do I bake bread?")
ANSWER = Conversation.of("How do I bake bread?", "Mix flour and water.")
LONG = Conversation.of("Why is the sky blue?", "Because the air scatters blue light more than red light, as we see.")


def rendered(guard: Guard, *conversations: Conversation) -> list[list[int]]:
    renderer, invocation = guard.engine.renderer, guard.spec.invocation
    return [renderer.judged(one, one.target, invocation).ids for one in conversations]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_pefts_activated_lora(architecture: str, tmp_path: Path) -> None:
    """One pass of PEFT over the whole text, which finds the invocation by its tokens, is the reference."""
    guard = Guard.load(tiny_guard_folder(tmp_path, architecture, "alora"), precision="fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "guard")).eval()
    for ids in rendered(guard, PROMPT, ANSWER, LONG):
        with torch.no_grad():
            reference = peft(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            expected = guard.engine.model.heads(reference[None])
            base = guard.engine.model.heads(plain.model(torch.tensor([ids]))[0][:, -1])
        scored = guard.engine.guard_logits([ids])
        assert torch.allclose(scored, expected, atol=2e-5)
        assert not torch.allclose(scored, base, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_those_of_pefts_one_pass(architecture: str, tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, architecture, "alora"), precision="fp32")
    model = guard.engine.model
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "guard"), is_trainable=True
    ).eval()
    rows, end = rendered(guard, PROMPT, ANSWER, LONG), len(model.invocation)
    features = [peft(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in rows]
    model.heads(torch.stack(features)).square().sum().backward()
    expected = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.requires_grad}

    trained = {name: p for name, p in model.base.named_parameters() if ".lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    ids, mask = pad([row[:-end] for row in rows], 0)
    with adapter.switched(model.base, model.adapter):
        logits = model(torch.tensor([row[-end:] for row in rows]), prefixes=[model.read(ids, mask)])
    logits.square().sum().backward()
    assert len(expected) == len(trained) > 0
    for name, parameter in trained.items():
        reference = expected["base_model.model." + name]
        assert torch.allclose(parameter.grad, reference, atol=1e-4 * float(reference.abs().max()) + 1e-6), name


@pytest.mark.parametrize("kind", ["lora", "alora", "none"])
def test_one_text_scores_the_same_held_alone_and_in_a_batch(kind: str, tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, adapter_kind=kind), precision="fp32")
    alone, among = guard.moderate(ANSWER), guard.moderate([LONG, ANSWER, PROMPT])[1]
    session = guard.session()
    ids, end = guard.engine.renderer.chat(PROMPT)
    session.append(ids)
    for token in guard.engine.renderer.content_ids("Mix flour and water."):
        session.append([token])
    held = guard.verdict(session.judge("response"), "response")
    prompt = guard.verdict(session.judge("prompt", at=end), "prompt")
    together = guard.engine.judge([(session, "response", None), (session, "prompt", end)])
    assert among.score == pytest.approx(alone.score, abs=1e-5)
    assert held.score == pytest.approx(alone.score, abs=1e-5)
    assert prompt.score == pytest.approx(guard.moderate(PROMPT).score, abs=1e-5)
    assert together[0].harmful == pytest.approx(session.judge("response").harmful, abs=1e-5)
    assert together[1].harmful == pytest.approx(session.judge("prompt", at=end).harmful, abs=1e-5)


def test_a_judgement_neither_copies_nor_changes_the_chats_keys_and_values(tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, adapter_kind="alora"), precision="fp32")
    session = guard.session()
    session.append(guard.engine.renderer.chat(PROMPT)[0])
    prefix = session.judged_prefix("prompt")
    assert prefix.layers[0][0].data_ptr() == session.cache.layers[0].keys.data_ptr()
    before = [(keys.clone(), values.clone()) for keys, values in prefix.layers]
    session.judge("prompt")
    session.judge("prompt", at=4)
    after = session.cache.prefix()
    for (keys, values), (new_keys, new_values) in zip(before, after.layers, strict=True):
        assert torch.equal(keys, new_keys)
        assert torch.equal(values, new_values)


def test_the_adapter_is_read_by_peft_and_refused_for_another_invocation(tmp_path: Path) -> None:
    folder = tiny_guard_folder(tmp_path, adapter_kind="alora")
    guard = Guard.load(folder)
    assert (
        adapter.config_dict(guard.engine.model.adapter, "x")["alora_invocation_tokens"] == guard.engine.model.invocation
    )
