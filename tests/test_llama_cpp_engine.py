"""The on-device engine gives what the torch engine gives, and its judgements change no bit of the chat."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guards import judged_generation, tiny_guard_folder
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tiny_gguf import tiny_gguf

from lora_guard import ChatEnd, Conversation, Guard, base_model, norms
from lora_guard.errors import InputError
from lora_guard.norms import ARCHITECTURES

pytest.importorskip("llama_cpp", reason="needs the extra 'device'; make test-extras builds it")
pytestmark = pytest.mark.extras

PROMPT = Conversation.of("How do I bake bread?")
ANSWER = Conversation.of("How do I bake bread?", "Mix flour and water.")
KINDS = ["lora", "alora", "none"]
ROUNDED = 2e-3  # of a logit near 1: the adapter is kept in fp16, and llama.cpp rounds what it multiplies likewise

Pair = tuple[Guard, Guard]
"""The same guard on the torch engine and on the device engine."""


def pair(folder: Path, architecture: str = "llama", kind: str = "alora", **settings: Any) -> Pair:
    guard = tiny_guard_folder(folder, architecture, kind, **settings)
    base = base_model.load(str(folder / "base")).model
    file = tiny_gguf(folder / "base.gguf", base)
    assert norms.of_model(base) == norms.of_gguf(file)
    plain = Guard.load(guard, precision="fp32")
    return plain, Guard.load(guard, engine="llama-cpp", base=str(file))


@pytest.fixture(scope="module", params=KINDS)
def guards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_GUARD_CACHE", str(cache))
        return pair(tmp_path_factory.mktemp("guard"), kind=request.param)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GUARD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_torch_engines_scores(architecture: str, kind: str, tmp_path: Path) -> None:
    plain, device = pair(tmp_path, architecture, kind)
    conversations = [PROMPT, ANSWER, Conversation.of("Why? " * 20, "Because.", system="Be kind.")]
    expected = plain.engine.score(conversations, ["prompt", "response", "response"])
    found = device.engine.score(conversations, ["prompt", "response", "response"])
    tolerance = ROUNDED if kind != "none" or architecture == "gemma" else 1e-4  # llama.cpp's GELU is a table in fp16
    for one, other in zip(expected, found, strict=True):
        assert other.harmful == pytest.approx(one.harmful, abs=tolerance)
        assert other.categories == pytest.approx(one.categories, abs=tolerance)


MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # phi3's names for the same


def scores_of(guard: Guard) -> Any:
    found = guard.engine.score([PROMPT, ANSWER], ["prompt", "response"])
    return np.array([[row.harmful, *row.categories] for row in found])


@pytest.mark.parametrize("kind", ["lora", "alora"])
@pytest.mark.parametrize(
    ("architecture", "modules"),
    [("llama", [module]) for module in MODULES]
    + [("phi3", [module]) for module in FUSED]
    + [(name, FUSED if name == "phi3" else MODULES) for name in ARCHITECTURES],
    ids=str,
)
def test_an_adapter_on_any_layer_gives_the_torch_engines_scores(
    architecture: str, modules: list[str], kind: str, tmp_path: Path
) -> None:
    plain, device = pair(tmp_path, architecture, kind, modules=modules, strength=0.05)
    expected, found = scores_of(plain), scores_of(device)
    device.engine.adapter = None
    effect = np.abs(scores_of(device) - expected).max()  # a wrong order of rows would be as large
    assert np.abs(found - expected).max() < 0.01 * effect


def test_the_adapter_counts(tmp_path: Path) -> None:
    _, with_adapter = pair(tmp_path / "a", kind="alora")
    bare = with_adapter.engine.score([PROMPT], ["prompt"])[0].harmful
    with_adapter.engine.adapter = None
    assert with_adapter.engine.score([PROMPT], ["prompt"])[0].harmful != pytest.approx(bare, abs=10 * ROUNDED)


def test_the_chat_is_the_torch_engines(guards: Pair) -> None:
    answers, scores = [], []
    for guard in guards:
        session = guard.session()
        ids, end = guard.engine.renderer.chat(PROMPT)
        session.append(ids)
        answers.append([session.sample() for _ in range(12)])
        scores.append([session.judge("prompt", at=end).harmful, session.judge("response").harmful])
    assert answers[0] == answers[1]
    assert scores[0] == pytest.approx(scores[1], abs=ROUNDED)


def test_a_chat_streams_text_checks_and_verdicts(guards: Pair) -> None:
    *texts, end = guards[1].chat(PROMPT, max_tokens=12)
    assert isinstance(end, ChatEnd)
    assert end.response == "".join(map(str, texts))
    assert end.response_verdict is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_judgements_at_every_position_change_no_token_and_no_bit_of_the_logits(
    guards: Pair, temperature: float
) -> None:
    device = guards[1]
    ids, _ = device.engine.renderer.chat(PROMPT)
    plain, *judged = [judged_generation(device, ids, judgements, temperature) for judgements in (0, 1, 3)]
    assert judged == [plain, plain]


def test_a_long_text_makes_way_between_the_passes_that_llama_cpp_makes_of_it(
    guards: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_guard.engine.llama_cpp import Part

    for module in ("llama_cpp", "llama_cpp_engine"):
        monkeypatch.setattr(f"lora_guard.engine.{module}.PASS_TOKENS", 64)
    device = guards[1]
    ids = [5 + number % 90 for number in range(3 * 64 + 40)]
    scores: list[object] = []
    session = device.engine.session(between=lambda: scores.append(device.moderate(ANSWER)))
    whole = session._new_context()
    whole.read([Part(0, 0, ids)])
    session.append(ids)
    assert session.logits.tobytes() == whole.logits().tobytes()
    assert scores == [device.moderate(ANSWER)] * 3


def test_sessions_side_by_side_are_each_bit_for_bit_what_they_are_alone(guards: Pair) -> None:
    device = guards[1]
    texts = [PROMPT, Conversation.of("Why?"), Conversation.of("What is the sky made of, and who says so?")]

    def run(*chosen: Conversation) -> list[tuple[list[int], bytes]]:
        sessions = [device.session() for _ in chosen]
        for session, text in zip(sessions, chosen, strict=True):
            session.append(device.engine.renderer.chat(text)[0])
        for _ in range(8):
            device.engine.decode(sessions, batch=True)
            for session in sessions:
                session.sample()
            device.engine.judge([(session, "response", None) for session in sessions])
        return [(session._ids, session.logits.tobytes()) for session in sessions]

    assert run(*texts) == [run(text)[0] for text in texts]


def test_a_held_conversation_is_judged_as_the_same_text_standing_alone(guards: Pair) -> None:
    device = guards[1]
    session = device.session()
    ids, end = device.engine.renderer.chat(PROMPT)
    session.append(ids)
    session.append(device.engine.renderer.content_ids("Mix flour and water."))
    for target, at, conversation in (("response", None, ANSWER), ("prompt", end, PROMPT), ("response", None, ANSWER)):
        held = device.verdict(session.judge(target, at=at), target)
        assert held.score == pytest.approx(device.moderate(conversation).score, abs=1e-5)


def test_after_a_rewind_the_session_goes_on_as_if_nothing_had_been_said(guards: Pair) -> None:
    device = guards[1]
    session = device.session()
    ids, _ = device.engine.renderer.chat(PROMPT)
    session.append(ids)
    runs = []
    for _ in range(2):
        tokens = [session.sample() for _ in range(4)]
        judged = session.judge("response")
        session.rewind(len(ids))
        assert session.position == len(ids)
        runs.append((tokens, judged.harmful))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] == pytest.approx(runs[1][1], abs=1e-5)


def test_results_come_in_input_order_and_long_text_in_windows(guards: Pair) -> None:
    plain, device = guards
    conversations = [PROMPT, Conversation.of("word " * 200), ANSWER, Conversation.of("")] * 8
    finished: list[int] = []
    verdicts = device.moderate(conversations, done=finished.append)
    assert sum(finished) == len(conversations)
    assert len(finished) > 1
    assert [verdict.windows > 1 for verdict in verdicts] == [False, True, False, False] * 8
    for one, other in zip(plain.moderate(conversations), verdicts, strict=True):
        assert one.windows == other.windows
        assert other.score == pytest.approx(one.score, abs=ROUNDED)


controls = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "user\n", " "])
texts = st.lists(st.one_of(controls, st.text(max_size=8)), max_size=6).map("".join)


@given(prompt=texts, response=texts)
def test_text_becomes_the_ids_of_transformers_tokenizer(guards: Pair, prompt: str, response: str) -> None:
    plain, device = (guard.engine.renderer for guard in guards)
    conversation = Conversation.of(prompt, response)
    invocation = guards[0].spec.invocation
    assert plain.judged(conversation, "response", invocation) == device.judged(conversation, "response", invocation)
    assert plain.chat(Conversation.of(prompt)) == device.chat(Conversation.of(prompt))


@given(texts)
def test_a_stream_of_tokens_becomes_the_text(guards: Pair, text: str) -> None:
    decode = guards[1].engine.decoder()
    ids = byte_tokenizer().encode(text, add_special_tokens=False)
    expected = byte_tokenizer().decode(ids, skip_special_tokens=True)
    assert "".join(map(decode, ids)) == expected


@pytest.mark.parametrize("at", [0, 999, -1])
def test_a_position_outside_the_conversation_is_refused(guards: Pair, at: int) -> None:
    session = guards[1].session()
    session.append([5, 6, 7])
    with pytest.raises(InputError, match="allowed: 1 to 3"):
        session.judge("prompt", at=at)


def test_bad_sampling_values_and_an_empty_or_full_session_are_refused(guards: Pair) -> None:
    device = guards[1]
    session = device.session()
    with pytest.raises(InputError, match="session is empty"):
        session.sample()
    with pytest.raises(InputError, match="temperature is -1"):
        session.sample(temperature=-1)
    with pytest.raises(InputError, match="top_p is 0"):
        session.sample(top_p=0)
    with pytest.raises(InputError, match="would hold"):
        session.append([5] * (device.engine.context + 1))
    session.append([5] * device.engine.context)
    session.judge("prompt")
    with pytest.raises(InputError, match="would hold"):
        session.sample()


def test_a_session_of_another_engine_is_refused(guards: Pair) -> None:
    plain, device = guards
    with pytest.raises(InputError, match="a session of TorchSession is not"):
        device.engine.judge([(plain.session(), "prompt", None)])


def test_top_p_draws_from_the_likeliest_tokens_only() -> None:
    from lora_guard.engine.llama_cpp_engine import choose

    logits, random = np.array([0.0, 5.0, 4.0, -3.0], np.float32), np.random.default_rng(0)
    assert {choose(logits, 1.0, 0.9, random) for _ in range(200)} == {1, 2}
    assert {choose(logits, 1.0, 1e-6, random) for _ in range(20)} == {1}
    assert choose(logits, 0.0, 1.0, random) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(5e-324, 1.0), (1e-40, 0.5), (1.0, 5e-324), (5e-324, 5e-324)])
def test_the_smallest_sampling_values_take_the_likeliest_token(temperature: float, top_p: float) -> None:
    from lora_guard.engine.llama_cpp_engine import choose

    logits = np.array([0.0, 5.0, 4.0, -3.0], dtype=np.float32)
    assert choose(logits, temperature, top_p, np.random.default_rng(0)) == 1
