"""The two paths: generation is the untouched chat model's, bit for bit; a text scores the same everywhere."""

import threading
from pathlib import Path

import pytest
import torch
from guards import judged_generation, tiny_guard_folder
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES

from lora_guard import Conversation, Guard, adapter, base_model
from lora_guard.engine.torch_engine import choose
from lora_guard.errors import InputError, ResourceError

PROMPT = Conversation.of("How do I bake bread?")
ANSWER = Conversation.of("How do I bake bread?", "Mix flour and water.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_guard_folder(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def guard(folder: Path) -> Guard:
    return Guard.load(folder, precision="fp32")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_bit_for_bit_that_of_the_untouched_model(architecture: str, tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, architecture), precision="fp32")
    untouched = base_model.load(str(tmp_path / "base")).model
    ids, end = guard.engine.renderer.chat(PROMPT)
    expected = untouched.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    session = guard.session()
    session.append(ids)
    with torch.inference_mode():
        assert torch.equal(session.logits, untouched(torch.tensor([ids]), logits_to_keep=1).logits[0, -1])
    tokens = []
    for _ in expected:
        session.judge("prompt", at=end)
        session.judge("response")
        tokens.append(session.sample())
    assert tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lora", "alora", "none"])
def test_judgements_at_every_position_change_no_token_and_no_logit(
    kind: str, temperature: float, tmp_path: Path
) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, adapter_kind=kind), precision="fp32")
    ids, _ = guard.engine.renderer.chat(PROMPT)
    plain, *judged = [judged_generation(guard, ids, judgements, temperature) for judgements in (0, 1, 3)]
    assert judged == [plain, plain]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_between_the_layers_of_another_change_no_bit_of_either(architecture: str, tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, architecture), precision="fp32")
    ids, _ = guard.engine.renderer.chat(PROMPT)
    other = guard.session()
    other.append(ids)
    plain, verdict = other.logits, guard.moderate(PROMPT)
    found: list[object] = []
    session = guard.engine.session(
        between=lambda: found.append((other.judge("prompt", len(ids)), guard.moderate(PROMPT)))
    )
    session.append(ids)
    assert torch.equal(session.logits, plain)
    assert session.judge("prompt") == other.judge("prompt")
    assert session.sample() == other.sample()
    assert torch.equal(session.logits, other.logits)
    layers = guard.engine.model.base.config.get_text_config().num_hidden_layers
    assert found == [(other.judge("prompt", len(ids)), verdict)] * (2 * layers)


@pytest.mark.parametrize("kind", ["lora", "alora"])
def test_a_judgement_never_reads_a_prefix_twice(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, adapter_kind=kind), precision="fp32")
    session = guard.session()
    session.append(guard.engine.renderer.chat(PROMPT)[0])
    session.judge("prompt")
    decoder = guard.engine.model.base.get_decoder()
    read: list[int] = []
    decoder.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    invocation = len(guard.engine.model.invocation)
    for _ in range(3):
        session.sample()
        session.judge("response")
    reads_of_the_token = 1 if kind == "alora" else 2  # by the chat and, with another cache, by the guard
    assert sum(read) == 3 * (reads_of_the_token + invocation) - (kind == "lora")  # the last one waits for a sample


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_sessions_decode_in_one_pass_as_they_do_alone(architecture: str, tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, architecture, "alora"), precision="fp32")
    texts = [PROMPT, Conversation.of("Why?"), Conversation.of("What is the sky made of, and who says so?")]
    runs = []
    for batch in (False, True):
        sessions = [guard.session() for _ in texts]
        for session, text in zip(sessions, texts, strict=True):
            session.append(guard.engine.renderer.chat(text)[0])
        for _ in range(8):
            guard.engine.decode(sessions, batch=batch)
            for session in sessions:
                session.sample()
        runs.append(([session._ids for session in sessions], torch.stack([session.logits for session in sessions])))
    (tokens, logits), (batch_tokens, batch_logits) = runs
    assert tokens == batch_tokens
    assert torch.allclose(logits, batch_logits, atol=1e-4)


def test_the_guard_path_differs_from_the_base(guard: Guard) -> None:
    model = guard.engine.model
    ids = torch.tensor([guard.engine.renderer.chat(PROMPT)[0]])
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        with adapter.switched(model.base, model.adapter):
            on = model.features(ids, mask)
        with adapter.switched(model.base, None):
            off = model.features(ids, mask)
    assert not torch.allclose(on, off, atol=1e-3)


texts = st.text(max_size=80)


@given(st.lists(texts, max_size=5), st.lists(texts, max_size=5))
def test_a_text_scores_the_same_alone_and_beside_any_neighbours(
    guard: Guard, before: list[str], after: list[str]
) -> None:
    alone = guard.moderate(ANSWER)
    among = guard.moderate([*map(Conversation.of, before), ANSWER, *map(Conversation.of, after)])[len(before)]
    assert among.score == pytest.approx(alone.score, abs=1e-4)
    for name, decision in alone.categories.items():
        assert among.categories[name].score == pytest.approx(decision.score, abs=1e-4)


def test_in_bf16_a_text_scores_the_same_within_three_hundredths(folder: Path) -> None:
    guard = Guard.load(folder, precision="bf16")
    alone = guard.moderate(ANSWER).score
    among = guard.moderate([Conversation.of("x" * 100), ANSWER, PROMPT])[1].score
    assert among == pytest.approx(alone, abs=0.03)


def test_for_bulk_work_the_base_itself_is_held_in_bf16_and_scores_stay(folder: Path) -> None:
    guards = [Guard.load(folder, precision="bf16", bulk=bulk) for bulk in (False, True)]
    assert [next(one.engine.model.base.parameters()).dtype for one in guards] == [torch.float32, torch.bfloat16]
    conversations = [Conversation.of("x" * 100), ANSWER, PROMPT]
    plain, bulk = ([verdict.score for verdict in one.moderate(conversations)] for one in guards)
    assert bulk == pytest.approx(plain, abs=0.03)


def test_a_held_conversation_is_judged_as_the_same_text_standing_alone(guard: Guard) -> None:
    session = guard.session()
    ids, end = guard.engine.renderer.chat(PROMPT)
    session.append(ids)
    session.append(guard.engine.renderer.content_ids("Mix flour and water."))
    for target, at, conversation in (("prompt", end, PROMPT), ("response", None, ANSWER)):
        held = guard.verdict(session.judge(target, at=at), target)
        assert held.score == pytest.approx(guard.moderate(conversation).score, abs=1e-5)


def test_an_eos_inside_the_text_does_not_end_it(guard: Guard) -> None:
    """pad = eos: the last token is the last attended one, on either side of padding."""
    model, end = guard.engine.model, guard.engine.base.tokenizer.eos_token_id
    assert guard.engine.base.pad_id == end
    text = [5, 6, end, 7, 8]
    with torch.inference_mode():
        alone = model.features(torch.tensor([text]), torch.ones(1, 5, dtype=torch.long))
        padded = torch.tensor([text + [end] * 3])
        mask = torch.tensor([[1] * 5 + [0] * 3])
        assert torch.allclose(model.features(padded, mask), alone, atol=1e-5)


def test_results_come_in_input_order_and_long_text_in_windows(guard: Guard) -> None:
    long = Conversation.of("word " * 200)
    conversations = [PROMPT, long, ANSWER, Conversation.of("")]
    finished: list[int] = []
    verdicts = guard.moderate(conversations, done=finished.append)
    assert sum(finished) == len(conversations)
    assert [verdict.windows > 1 for verdict in verdicts] == [False, True, False, False]
    windows = guard.engine.renderer.judged(long, "prompt", guard.spec.invocation).windows(guard.spec.max_length)
    highest = guard.engine.guard_logits(windows).amax(0)
    assert verdicts[1].score == pytest.approx(float(highest[0].sigmoid()), abs=1e-4)
    for conversation, verdict in zip(conversations, verdicts, strict=True):
        assert verdict.score == pytest.approx(guard.moderate(conversation).score, abs=1e-4)


def test_threads_that_chat_and_moderate_at_once_do_not_disturb_each_other(guard: Guard) -> None:
    expected = list(guard.chat(PROMPT, max_tokens=12))
    score = guard.moderate(ANSWER).score
    chats: list[list[object]] = []
    scores: list[float] = []
    threads = [threading.Thread(target=lambda: chats.append(list(guard.chat(PROMPT, max_tokens=12)))) for _ in range(3)]
    threads += [threading.Thread(target=lambda: scores.append(guard.moderate(ANSWER).score)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chats == [expected] * 3
    assert scores == [score] * 6


def test_after_a_rewind_the_session_goes_on_as_if_nothing_had_been_said(guard: Guard) -> None:
    session = guard.session()
    ids, _ = guard.engine.renderer.chat(PROMPT)
    session.append(ids)
    first = [session.sample() for _ in range(4)]
    session.rewind(len(ids))
    assert session.position == len(ids)
    assert [session.sample() for _ in range(4)] == first


@pytest.mark.parametrize("at", [0, 999, -1])
def test_a_position_outside_the_conversation_is_refused(guard: Guard, at: int) -> None:
    session = guard.session()
    session.append([5, 6, 7])
    with pytest.raises(InputError, match="allowed: 1 to 3"):
        session.judge("prompt", at=at)


def test_bad_sampling_values_and_an_empty_or_full_session_are_refused(guard: Guard) -> None:
    session = guard.session()
    with pytest.raises(InputError, match="session is empty"):
        session.sample()
    with pytest.raises(InputError, match="temperature is -1"):
        session.sample(temperature=-1)
    with pytest.raises(InputError, match="top_p is 0"):
        session.sample(top_p=0)
    with pytest.raises(InputError, match="would hold"):
        session.append([5] * (guard.engine.base.context + 1))


def test_no_memory_for_a_batch_is_one_clear_line(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(guard.engine.model, "forward", fail)
    with pytest.raises(ResourceError, match="no memory for a batch of 1 rows"):
        guard.moderate(PROMPT)


def test_top_p_draws_from_the_likeliest_tokens_only() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, -3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, 1.0, 0.9, generator) for _ in range(200)}
    assert drawn == {1, 2}
    assert {choose(logits, 1.0, 1e-6, generator) for _ in range(20)} == {1}
    assert choose(logits, 0.0, 1.0, generator) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(5e-324, 1.0), (1e-40, 0.5), (1.0, 5e-324), (5e-324, 5e-324)])
def test_the_smallest_sampling_values_take_the_likeliest_token(temperature: float, top_p: float) -> None:
    assert choose(torch.tensor([0.0, 5.0, 4.0, -3.0]), temperature, top_p, torch.Generator().manual_seed(0)) == 1
