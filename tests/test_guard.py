"""The object users hold: verdicts on one or many, chats that end with verdicts, blocking that lets nothing out."""

import json
import shutil
from pathlib import Path

import pytest
from guards import judged_generation, tiny_guard_folder

from lora_guard import ChatEnd, Check, Conversation, Guard, StreamSettings, Verdict
from lora_guard.errors import ArtifactError, ConfigError, GuardError, InputError
from lora_guard.verdict import GuardLogits

PROMPT = Conversation.of("How do I bake bread?")
ANSWER = Conversation.of("How do I bake bread?", "Mix flour and water.")


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Guard]:
    """The same guard three times: one flags everything, one nothing, one only what scores above all prompts here."""
    folder = tiny_guard_folder(tmp_path_factory.mktemp("guard"))
    found = {}
    for name, threshold in (("everything", 0.0), ("nothing", 1.0)):
        copy = Path(shutil.copytree(folder, folder.parent / name))
        spec = json.loads((copy / "guard.json").read_text("utf-8"))
        for target in ("prompt", "response"):
            spec["calibration"][target]["harmful"]["thresholds"]["balanced"] = threshold
        (copy / "guard.json").write_text(json.dumps(spec), "utf-8")
        found[name] = Guard.load(copy, precision="fp32")
    return found


def test_a_verdict_has_the_documented_json_form(guards: dict[str, Guard]) -> None:
    verdict = guards["everything"].moderate(ANSWER)
    form = json.loads(json.dumps(verdict.to_dict()))
    assert list(form) == ["flagged", "score", "threshold", "target", "categories"]
    assert form["flagged"] is True
    assert form["target"] == "response"
    assert list(form["categories"]) == ["a", "b"]
    assert all(list(decision) == ["flagged", "score", "threshold"] for decision in form["categories"].values())


def test_only_windowed_text_says_its_windows(guards: dict[str, Guard]) -> None:
    form = guards["nothing"].moderate(Conversation.of("word " * 100)).to_dict()
    assert form["windows"] > 1


def test_a_list_gives_a_list_and_one_gives_one(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    assert isinstance(guard.moderate(PROMPT), Verdict)
    assert [verdict.target for verdict in guard.moderate([PROMPT, ANSWER])] == ["prompt", "response"]
    assert guard.moderate([]) == []


def test_a_verdict_is_the_calibration_of_the_logits(guards: dict[str, Guard]) -> None:
    guard, finished = guards["nothing"], []
    rows = guard.logits([PROMPT, ANSWER], done=finished.append)
    assert [guard.verdict(*pair) for pair in zip(rows, ("prompt", "response"), strict=True)] == guard.moderate(
        [PROMPT, ANSWER]
    )
    assert sum(finished) == 2
    assert guard.logits([ANSWER], target="prompt")[0].harmful == pytest.approx(rows[0].harmful, abs=1e-5)


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("alora", "lora"), ("lora", "alora"), ("none", "alora")])
def test_guards_on_one_chat_model_judge_and_chat_as_they_do_alone(tmp_path: Path, kinds: tuple[str, str]) -> None:
    folders = [
        tiny_guard_folder(tmp_path / str(place), adapter_kind=kind, strength=0.5 + place)
        for place, kind in enumerate(kinds)
    ]
    alone = [Guard.load(folder, precision="fp32") for folder in folders]
    first = Guard.load(folders[0], precision="fp32")
    second = Guard.load(folders[1], on=first, precision="fp32")
    assert second.engine.base is first.engine.base
    ids, _ = first.engine.renderer.chat(PROMPT)
    for _ in range(2):  # in turn
        for shared, single in zip((first, second), alone, strict=True):
            assert shared.logits([PROMPT, ANSWER]) == single.logits([PROMPT, ANSWER])
            assert judged_generation(shared, ids, 1, 0.7) == judged_generation(single, ids, 1, 0.7)
    assert first.logits([PROMPT]) != second.logits([PROMPT])
    second.engine.leave()
    second.engine.leave()  # once is enough
    with pytest.raises(GuardError, match="has left the chat model"):
        second.moderate(PROMPT)
    assert first.logits([PROMPT, ANSWER]) == alone[0].logits([PROMPT, ANSWER])
    assert not any("_1." in name for name, _ in first.engine.base.model.named_parameters())


def test_only_torch_guards_share_a_chat_model_and_only_as_it_is(guards: dict[str, Guard], tmp_path: Path) -> None:
    folder, guard = tiny_guard_folder(tmp_path), guards["nothing"]
    with pytest.raises(InputError, match="on the torch engine alone; allowed: engine 'torch'"):
        Guard.load(folder, on=guard, engine="llama-cpp")
    with pytest.raises(InputError, match="allowed beside another guard: no base, device or bulk"):
        Guard.load(folder, on=guard, base="default")


def test_a_guard_of_another_chat_model_does_not_go_on_this_one(guards: dict[str, Guard], tmp_path: Path) -> None:
    other = tiny_guard_folder(tmp_path, architecture="qwen2")
    with pytest.raises(ArtifactError, match="was trained on weights"):
        Guard.load(other, on=guards["nothing"])


def test_the_target_can_be_overridden(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    assert guard.moderate(ANSWER, target="prompt").score == pytest.approx(guard.moderate(PROMPT).score)
    with pytest.raises(InputError, match="needs a message of role 'assistant'"):
        guard.moderate(PROMPT, target="response")
    with pytest.raises(InputError, match="allowed: prompt, response"):
        guard.moderate(PROMPT, target="answer")  # type: ignore[arg-type]


DISGUISED = Conversation.of("H\u200bow do I b\u0430ke bread?")


def test_text_is_judged_as_it_came_and_normalised_and_the_higher_logits_count(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    answered = DISGUISED.with_message("assistant", "Mix\u200b flour and water.")
    for target, disguised, plain in (("prompt", DISGUISED, PROMPT), ("response", answered, ANSWER)):
        raw, normalised = guard.engine.score([disguised, plain], [target, target])  # type: ignore[list-item]
        (found,) = guard.logits([disguised])
        assert found.harmful == pytest.approx(max(raw.harmful, normalised.harmful), abs=1e-5)
        assert found.categories == pytest.approx(
            list(map(max, raw.categories, normalised.categories)),
            abs=1e-5,
        )
        assert raw.harmful != normalised.harmful


def test_the_windows_of_a_verdict_are_those_of_the_text_as_it_came(guards: dict[str, Guard]) -> None:
    disguised = Conversation.of("\u200b".join("word " * 40))
    (raw,) = guards["nothing"].engine.score([disguised], ["prompt"])
    assert guards["nothing"].moderate(disguised).windows == raw.windows > 1


def test_progress_counts_conversations_whatever_is_judged_of_them(guards: dict[str, Guard]) -> None:
    counts: list[int] = []
    guards["nothing"].moderate([DISGUISED, PROMPT, DISGUISED], done=counts.append)
    assert sum(counts) == 3


def test_a_chat_judges_its_prompt_in_both_forms_and_its_answer_as_it_is(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    *_, end = guard.chat(DISGUISED, max_tokens=10)
    assert isinstance(end, ChatEnd)
    assert end.prompt_verdict.score == pytest.approx(guard.moderate(DISGUISED).score, abs=1e-5)
    low = GuardLogits(-100.0, (-100.0, -100.0))
    verdict = guard.chat_verdict(DISGUISED)
    assert verdict(low, "prompt").score > 0.001
    assert verdict(low, "response").score < 0.001


def test_a_prompt_that_is_not_checked_costs_no_judgement(
    guards: dict[str, Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guards["nothing"]
    monkeypatch.setattr(guard.engine, "score", lambda *args, **kwargs: pytest.fail("a judgement"))
    *_, end = guard.stream(DISGUISED, StreamSettings("off"), max_tokens=5)
    assert isinstance(end, ChatEnd)
    assert end.prompt_verdict is None


def test_a_chat_of_plain_text_is_judged_once(guards: dict[str, Guard], monkeypatch: pytest.MonkeyPatch) -> None:
    guard = guards["nothing"]
    monkeypatch.setattr(guard.engine, "score", lambda *args, **kwargs: pytest.fail("a second judgement"))
    *_, end = guard.chat(PROMPT, max_tokens=3)
    assert isinstance(end, ChatEnd)


def test_a_chat_yields_its_answer_in_pieces_and_ends_with_verdicts(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    *pieces, end = guard.chat(PROMPT, max_tokens=10)
    assert isinstance(end, ChatEnd)
    assert all(isinstance(piece, str) for piece in pieces)
    assert "".join(map(str, pieces)) == end.response
    assert end.prompt_verdict.score == pytest.approx(guard.moderate(PROMPT).score, abs=1e-5)
    assert end.response_verdict is not None
    assert end.response_verdict.target == "response"
    assert end.finish_reason in ("length", "stop")


def test_sampling_is_reproduced_by_its_seed(guards: dict[str, Guard]) -> None:
    guard = guards["nothing"]
    runs = [list(guard.chat(PROMPT, max_tokens=10, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_blocking_chat_answers_no_flagged_prompt(guards: dict[str, Guard]) -> None:
    (end,) = guards["everything"].chat(PROMPT, max_tokens=10, block=True)
    assert isinstance(end, ChatEnd)
    assert end == ChatEnd(None, end.prompt_verdict, None, "content_filter")


def test_a_blocking_chat_yields_nothing_of_a_flagged_answer(
    guards: dict[str, Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guards["nothing"]
    verdict = guard.verdict
    monkeypatch.setattr(
        guard,
        "verdict",
        lambda logits, target: guards["everything" if target == "response" else "nothing"].spec.calibration.verdict(
            logits, target
        ),
    )
    (end,) = guard.chat(PROMPT, max_tokens=10, block=True)
    assert isinstance(end, ChatEnd)
    assert end.response is None
    assert end.finish_reason == "content_filter"
    assert end.response_verdict is not None
    assert end.response_verdict.flagged
    monkeypatch.setattr(guard, "verdict", verdict)
    *pieces, end = guard.chat(PROMPT, max_tokens=10, block=True)
    assert isinstance(end, ChatEnd)
    assert "".join(map(str, pieces)) == end.response


@pytest.mark.parametrize("block", [False, True])
def test_a_chat_is_the_stream_without_its_checks(guards: dict[str, Guard], block: bool) -> None:
    how = {"max_tokens": 20, "temperature": 1.0, "seed": 5}
    events = list(guards["nothing"].stream(PROMPT, StreamSettings("block" if block else "score"), **how))  # type: ignore[arg-type]
    assert sum(isinstance(event, Check) for event in events) >= 3  # the prompt, 16 tokens, 20 tokens
    shown = [event for event in events if not isinstance(event, Check)]
    assert list(guards["nothing"].chat(PROMPT, block=block, **how)) == shown  # type: ignore[arg-type]


def test_without_blocking_a_flagged_answer_is_shown_and_flagged(guards: dict[str, Guard]) -> None:
    *pieces, end = guards["everything"].chat(PROMPT, max_tokens=10)
    assert isinstance(end, ChatEnd)
    assert pieces
    assert end.prompt_verdict.flagged
    assert end.finish_reason != "content_filter"


def test_a_chat_needs_a_prompt_to_answer(guards: dict[str, Guard]) -> None:
    with pytest.raises(InputError, match="last message must be the user's"):
        next(guards["nothing"].chat(ANSWER))
    with pytest.raises(InputError, match="last message must be the user's"):
        next(guards["nothing"].stream(ANSWER))


def test_characters_of_several_bytes_are_yielded_whole(guards: dict[str, Guard]) -> None:
    decode = guards["nothing"].engine.decoder()
    ids = guards["nothing"].engine.renderer.content_ids("a🍞é")
    pieces = [decode(token) for token in ids]
    assert "".join(pieces) == "a🍞é"
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == ["a", "🍞", "é"]


def test_a_guard_is_not_put_together_without_its_token_head(tmp_path: Path) -> None:
    guard = Guard.load(tiny_guard_folder(tmp_path, token_head=True))
    with pytest.raises(ConfigError, match="guard 'tiny' has a token head; allowed: with it"):
        Guard(guard.spec, guard.engine)
    second = Guard(guard.spec, guard.engine, policy="strict", token_head=guard.token_head)
    text = Conversation.of("How do I bake bread?")
    assert second.moderate(text).score == guard.moderate(text).score
