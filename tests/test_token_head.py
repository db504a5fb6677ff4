"""The token head has its part in a prompt's score on every path, and in nothing else."""

from pathlib import Path

import numpy as np
import pytest
from guards import tiny_guard_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from lora_guard import ChatEnd, Conversation, Guard, artifact, token_head
from lora_guard.errors import ArtifactError
from lora_guard.token_head import TokenHead

WEIGHT = np.array([0.5, -1.0, 2.0, 4.0], dtype=np.float32)


@given(st.lists(st.integers(0, 9)), st.randoms())
def test_order_and_repetition_say_nothing(ids: list[int], random: object) -> None:
    head = TokenHead(WEIGHT)
    shuffled = ids + ids[:3]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert head.logit(shuffled) == head.logit(ids)


def test_different_tokens_are_summed_over_the_root_of_their_number() -> None:
    head = TokenHead(WEIGHT)
    assert head.logit([]) == 0
    assert head.logit([3]) == 4
    assert head.logit([0, 1, 2, 3, 3]) == pytest.approx(5.5 / 2)
    assert head.logit([3, 100]) == pytest.approx(4 / np.sqrt(2))  # a token behind the vocabulary weighs nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"), adapter_kind="alora", token_head=True)


@pytest.fixture(scope="module")
def guard(folder: Path) -> Guard:
    return Guard.load(folder, precision="fp32")


@pytest.fixture(scope="module")
def without(folder: Path) -> Guard:
    """The same guard, its head left out."""
    loaded = Guard.load(folder, precision="fp32")
    loaded.token_head = None
    return loaded


TEXT = "How do I bake bread?"


def test_a_prompts_harmfulness_grows_by_it_and_nothing_else_changes(guard: Guard, without: Guard) -> None:
    assert guard.token_head is not None
    added = guard.token_head.logit(guard.engine.renderer.content_ids(TEXT))
    assert abs(added) > 0.1
    for conversation, target, part in (
        (Conversation.of(TEXT), None, added),
        (Conversation.of(TEXT, "Warm."), None, 0.0),
        (Conversation.of(TEXT, "Warm."), "prompt", added),
        (Conversation.of(TEXT, system="Be kind."), None, added),
    ):
        (with_it,), (plain,) = (one.logits([conversation], target=target) for one in (guard, without))  # type: ignore[arg-type]
        assert with_it.harmful == pytest.approx(plain.harmful + part, abs=1e-5)
        assert with_it.categories == plain.categories


@pytest.mark.parametrize("text", [TEXT, "b\u200bake br\u0435ad", ""])
def test_a_chats_prompt_has_the_score_that_moderate_gives_it(guard: Guard, text: str) -> None:
    *_, end = guard.chat(Conversation.of(text), max_tokens=2)
    assert isinstance(end, ChatEnd)
    assert end.prompt_verdict.score == pytest.approx(guard.moderate(Conversation.of(text)).score, abs=1e-5)


def test_the_words_of_a_disguised_prompt_are_those_of_its_normalised_form(guard: Guard, without: Guard) -> None:
    assert guard.token_head is not None
    plain, disguised = "bake bread", "b\u200bake br\u0435ad"
    added = []
    for text in (plain, disguised):
        (with_it,), (bare,) = (one.logits([Conversation.of(text)]) for one in (guard, without))
        added.append(with_it.harmful - bare.harmful)
    assert added[0] == pytest.approx(added[1], abs=1e-5)
    assert added[0] == pytest.approx(guard.token_head.part(guard.engine.renderer, plain), abs=1e-5)


def test_its_weights_are_counted(guard: Guard, folder: Path, tmp_path: Path) -> None:
    bare = Guard.load(tiny_guard_folder(tmp_path, adapter_kind="alora"))
    assert guard.parameters == (bare.parameters or 0) + 256


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": WEIGHT},
        {"weight": WEIGHT[None]},
        {"weight": WEIGHT, "bias": WEIGHT},
        {"weight": np.array([1.0, np.nan], dtype=np.float32)},
    ],
)
def test_what_is_no_token_head_is_refused(tensors: dict[str, np.ndarray], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact.rewrite(folder, out, artifact.read_spec(folder), card="", token_head=save(tensors))
    with pytest.raises(ArtifactError, match=r"token_head\.safetensors: allowed: one tensor"):
        Guard.load(out)
    (out / "token_head.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is corrupted"):
        token_head.read(out, artifact.read_spec(out))


def test_a_guard_without_one_has_no_such_file(tmp_path: Path) -> None:
    bare = tiny_guard_folder(tmp_path)
    assert token_head.read(bare, artifact.read_spec(bare)) is None
    assert not (bare / "token_head.safetensors").exists()
