"""Conversations: valid by construction, and the target is told by the last message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.conversation import Conversation, Message
from lora_guard.errors import InputError

DIALOGUE = (
    Conversation.of("How do I bake bread?", "Mix flour and water.", system="Be kind.")
    .with_message("user", "And then?")
    .with_message("assistant", "Let it rise.")
)


def test_an_exchange_is_its_messages_in_order() -> None:
    assert [(m.role, m.content) for m in Conversation.of("a", "b", system="c").messages] == [
        ("system", "c"),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert Conversation.of("a") == Conversation((Message("user", "a"),))


def test_an_empty_response_is_a_response_and_none_is_not() -> None:
    assert Conversation.of("a", "").target == "response"
    assert Conversation.of("a").target == "prompt"
    assert Conversation.of("a", system="").target == "prompt"


def test_a_conversation_up_to_a_target_ends_with_the_last_message_of_its_kind() -> None:
    assert DIALOGUE.up_to("response") == DIALOGUE
    assert DIALOGUE.up_to("prompt").messages == DIALOGUE.messages[:-1]
    assert DIALOGUE.up_to("prompt").up_to("response").messages == DIALOGUE.messages[:3]


def test_one_more_message_leaves_the_conversation_as_it_was() -> None:
    before = DIALOGUE.messages
    longer = DIALOGUE.with_message("user", "Thanks.")
    assert DIALOGUE.messages == before
    assert longer.messages == (*before, Message("user", "Thanks."))


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1))
def test_the_form_of_chat_apis_is_read_as_it_stands(pairs: list[tuple[str, str]]) -> None:
    conversation = Conversation.from_messages([{"role": role, "content": text} for role, text in pairs])
    assert [(message.role, message.content) for message in conversation.messages] == pairs


@given(st.text(st.characters()))
def test_every_content_can_be_written_as_utf_8_and_valid_text_stays(text: str) -> None:
    content = Message("user", text).content
    content.encode("utf-8")
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert content == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "conversation is empty"),
        ([{"role": "user"}], "message 0 lacks content; needed: role, content"),
        ([{"role": "user", "content": "a"}, {}], "message 1 lacks content, role"),
        ([{"role": "User", "content": "a"}], "message role 'User' is unknown; did you mean 'user'"),
        ([{"role": "user", "content": ["a"]}], "user message has content of type list; allowed: a string"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Conversation.from_messages(messages)


def test_a_target_that_is_unknown_or_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'prompt'"):
        DIALOGUE.up_to("prompts")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="target 'response' needs a message of role 'assistant'"):
        Conversation.of("a").up_to("response")
    with pytest.raises(InputError, match="target 'prompt' needs a message of role 'user'"):
        Conversation.from_messages([{"role": "assistant", "content": "a"}]).up_to("prompt")
