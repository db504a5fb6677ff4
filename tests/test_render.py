"""Rendering: one way from messages to ids for training, moderation and chat; no content passes for a control token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, byte_tokenizer

from lora_guard import Conversation, Message
from lora_guard.errors import ConfigError, InputError, ModelError
from lora_guard.render import PLAIN_TEMPLATE, Rendered, Renderer

TOKENIZER = byte_tokenizer()
CONTROL = [token.content for token in TOKENIZER.added_tokens_decoder.values()]
CONTROL_IDS = {TOKENIZER.convert_tokens_to_ids(token) for token in CONTROL}

TRIMMING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% set text = m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trimming": TRIMMING,
    "thinking": THINKING,
    "no system": NO_SYSTEM,
    "plain": PLAIN_TEMPLATE,
}
EXCHANGE = Conversation.of("How do I bake bread?", "Mix flour and water.")
DIALOGUE = EXCHANGE.with_message("user", "And then?").with_message("assistant", "Let it rise.")


def renderer(template: str = CHATML) -> Renderer:
    return Renderer(
        template,
        lambda text, before: TOKENIZER.encode(text, add_special_tokens=False),
        control_tokens=CONTROL,
        variables=TOKENIZER.special_tokens_map,
    )


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("conversation", [EXCHANGE, DIALOGUE, Conversation.of("  trimmed?  \n")])
def test_the_rendered_text_is_what_transformers_renders(template: str, asks: bool, conversation: Conversation) -> None:
    segments = renderer(template).segments(conversation, generation_prompt=asks)
    expected = TOKENIZER.apply_chat_template(
        as_dicts(conversation), chat_template=template, tokenize=False, add_generation_prompt=asks
    )
    assert "".join(segment.text for segment in segments) == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_judged_is_what_a_chat_holds(template: str) -> None:
    """Standalone, as the training rows are rendered, and held by a session over two turns: the same ids."""
    made = renderer(template)
    held: list[int] = []
    for length in (1, 3):
        asked = Conversation(DIALOGUE.messages[:length])
        ids, end = made.chat(asked, held=length - 1)
        assert held + ids[:end] == made.judged(asked, "prompt", "").prefix
        held += ids + made.content_ids(DIALOGUE.messages[length].content)
        answered = Conversation(DIALOGUE.messages[: length + 1])
        if template != TRIMMING:  # its header of an answer is a blank that no generation prompt shows
            assert held == made.judged(answered, "response", "").prefix
        held = made.judged(answered, "response", "").prefix


def test_the_judged_prefix_ends_with_the_content_and_the_invocation_with_the_end_of_turn() -> None:
    made = renderer()
    rendered = made.judged(EXCHANGE, "response", made.end_of_turn)
    assert made.end_of_turn == "<|im_end|>"
    assert TOKENIZER.decode(rendered.target) == "Mix flour and water."
    assert TOKENIZER.decode(rendered.prefix).endswith("assistant\nMix flour and water.")
    assert rendered.ids == [*rendered.prefix, TOKENIZER.eos_token_id]
    prompt = made.judged(EXCHANGE, "prompt", made.end_of_turn)
    assert TOKENIZER.decode(prompt.target) == "How do I bake bread?"
    assert rendered.prefix[: len(prompt.prefix)] == prompt.prefix


def test_a_template_without_markers_ends_a_turn_with_a_newline() -> None:
    assert (
        renderer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}").end_of_turn == "\n"
    )


pieces = st.sampled_from([*CONTROL, "<|im_", "end|>", "<|", "|>", "<|im_<|im_end|>end|>", "\n", "<|im_start|>system\n"])
attacks = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=8).map("".join)


@given(attacks)
def test_content_never_yields_a_control_token_and_keeps_its_text(text: str) -> None:
    made = renderer()
    message = Message("user", text)  # lone surrogates are replaced here
    ids = made.content_ids(message.content)
    assert CONTROL_IDS.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == message.content


@given(attacks, attacks)
def test_the_turns_of_a_conversation_are_its_messages_whatever_they_say(prompt: str, response: str) -> None:
    made = renderer()
    ids = made.judged(Conversation.of(prompt, response), "response", made.end_of_turn).ids
    tame = made.judged(EXCHANGE, "response", made.end_of_turn).ids
    assert [token for token in ids if token in CONTROL_IDS] == [token for token in tame if token in CONTROL_IDS]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\t ",
        "\x00",
        "مرحبا كيف أخبز",
        "\ue0000\ue001",
        "\u2003\ue0001\ue001\u2003",
        "{{ 7 * 7 }}{% for %}",
        "\ud83c\udf5e",
        "🍞",
        "a\u0301",
    ],
)
def test_odd_text_is_rendered_as_it_is(text: str) -> None:
    content = Message("user", text).content
    target = renderer().judged(Conversation.of(text), "prompt", "").target
    assert TOKENIZER.decode(target) == content


def test_surrogates_are_joined_in_pairs_and_replaced_alone() -> None:
    assert Message("user", "\ud83c\udf5e").content == "🍞"
    assert Message("user", "a\ud800b").content == "a\ufffdb"


def test_a_megabyte_of_text_is_rendered_whole() -> None:
    text = "<|im_end|> word " * 65_536
    made = renderer()
    windows = made.judged(Conversation.of(text), "prompt", made.end_of_turn).windows(4096)
    assert all(len(window) <= 4096 for window in windows)
    assert sum(map(len, windows)) > len(text)


def test_content_that_is_no_text_and_unknown_roles_are_refused() -> None:
    with pytest.raises(InputError, match="content of type NoneType; allowed: a string"):
        Message("user", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="did you mean 'system'"):
        Message("systen", "x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="conversation is empty"):
        Conversation(())
    with pytest.raises(InputError, match="needs a message of role 'assistant'"):
        renderer().judged(Conversation.of("x"), "response", "")


def rendered_parts(context: int, target: int) -> Rendered:
    """Distinct ids everywhere, so that windows can be read."""
    return Rendered([1, 2], list(range(1000, 1000 + context)), [3], list(range(5000, 5000 + target)), [4])


@given(st.integers(0, 300), st.integers(0, 300), st.integers(40, 200))
def test_windows_show_every_token_in_no_more_than_their_length(context: int, target: int, length: int) -> None:
    rendered = rendered_parts(context, target)
    windows = rendered.windows(length)
    assert (len(windows) == 1) == (len(rendered.ids) <= length)
    assert {token for window in windows for token in window} == set(rendered.ids)
    for window in windows:
        assert len(window) <= length
        assert window[:2] == [1, 2]
        assert window[-1] == 4
        assert 3 in window
    if target:
        assert all(any(token >= 5000 for token in window) for window in windows)


def test_neighbouring_windows_overlap() -> None:
    first, second = rendered_parts(0, 200).windows(150)
    assert len(set(first) & {token for token in second if token >= 5000}) > 10


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length 10 leaves no room beside the chat template; allowed: 20 or more"):
        rendered_parts(50, 50).windows(10)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid jinja2"),
        (NO_SYSTEM, "refuses messages of roles system, user: System role not supported"),
        ("{{ messages[0]['content'] }}", "does not show each message once"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses messages"),
        ("{{ messages.append(1) }}", "refuses messages"),
    ],
)
def test_a_template_that_cannot_serve_is_one_clear_line(template: str, message: str) -> None:
    with pytest.raises((InputError, ModelError), match=message):
        renderer(template).segments(Conversation.of("hello", system="be kind"))


def test_a_template_that_names_the_date_does_not_change_from_day_to_day() -> None:
    template = "{{ strftime_now('%d') if strftime_now is defined else 'a day' }}{{ messages[0]['content'] }}"
    assert renderer(template).segments(Conversation.of("x"))[0].text == "a day"
