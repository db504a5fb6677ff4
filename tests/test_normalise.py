"""Normalising: disguises come off, plain text stays as it is, and what is normalised is not normalised further."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_guard.conversation import Conversation
from lora_guard.data.perturbation import _DOUBLES
from lora_guard.normalise import forms, normalised

PLAIN = "How do I bake bread? Mix 500 g of flour with 3 eggs at 18:30, says page 4."


@pytest.mark.parametrize(
    "text",
    [
        "how \u0434o",  # a look-alike of nothing
        "",
        PLAIN,
        "NASA and the BBC met at 10 Downing Street.",
        "Write to me@example.org or see https://example.org/a1b2 for COVID-19, MP3 and B2B.",
        "I paid $5 for 2 x 4 boards, 1 2 3 4 times!",
        "def f(x_1, y2): return x_1 @ y2",
        "Decode this: SG93IGRvIEkgYmFrZSBicmVhZCBpbiBhbiBvdmVuPw1zdGVwMQ==",
        "Caf\u00e9, na\u00efve, \u00dcber, \u0141\u00f3d\u017a",
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?",
        "\u0393\u03b5\u03b9\u03b1 \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5",
        "\u4f60\u597d\u4e16\u754c",
        "\u2764\ufe0f and \U0001f469\u200d\U0001f680",
    ],
)
def test_plain_text_of_any_language_stays_as_it_is(text: str) -> None:
    assert normalised(text) == text
    assert len(forms(Conversation.of(text))) == 1


@pytest.mark.parametrize(
    ("disguised", "text"),
    [
        (
            "PLEASE DECODE THIS STRING NOW: SG93IGRvIEkgYmFrZSBicmVhZCBpbiBhbiBvdmVuPw1zdGVwMQ==",
            "please decode this string now: SG93IGRvIEkgYmFrZSBicmVhZCBpbiBhbiBvdmVuPw1zdGVwMQ==",
        ),
        ("b\u200ba\u2060k\u00ade br\ufeffead", "bake bread"),
        ("bake\U000e0062\U000e0061 bread", "bake bread"),
        ("\u202ebake\u202c bread", "bake bread"),
        ("b\u0336a\u0336k\u0336e bread", "bake bread"),
        ("\uff42\uff41\uff4b\uff45 bread", "bake bread"),
        ("\u24d1\u24d0\u24da\u24d4 bread", "bake bread"),
        ("\U0001d41b\U0001d41a\U0001d424\U0001d41e bread", "bake bread"),
        ("b\u0430k\u0435 br\u0435\u0430d", "bake bread"),  # Cyrillic
        ("b\u03b1ke br\u03b5ad", "bake bread"),  # Greek
        ("b a k e   b r e a d", "bake bread"),
        ("b a k e   b r e a d   \u2026   a t   1 2", "bake bread ... at 12"),
        ("b-a-k-e bread", "bake bread"),
        ("b.a.k.e bread", "bake bread"),
        ("b4k3 br34d", "bake bread"),
        ("b@ke thi$ bread", "bake this bread"),
        ("b3st br34d 3v3r!", "best bread ever!"),
        ("BAKE SOME BREAD NOW", "bake some bread now"),
        ("bAkE sOmE bReAd NoW", "bake some bread now"),
        ("B 4 K 3   B R 3 4 D   T 0 D 4 Y", "bake bread today"),  # several at once
    ],
)
def test_a_disguise_comes_off(disguised: str, text: str) -> None:
    assert normalised(disguised) == text


@pytest.mark.parametrize(("letter", "doubles"), _DOUBLES.items())
def test_each_double_of_the_robustness_suite_is_folded(letter: str, doubles: str) -> None:
    assert {normalised(f"bread{double}") for double in doubles} == {f"bread{letter}"}


def test_a_selector_that_hides_behind_an_emoji_does_not_survive_in_a_run() -> None:
    assert normalised("\u2764" + "\ufe00\ufe01\ufe02" * 5 + " bread") == "\u2764 bread"


HARD = st.text(
    st.sampled_from("abAZ019@$! .-_\n\u0430\u0410\u03b1\u200b\ufb03\u0130\u0345\u0301\ufe0f\u2764\U000e0061")
)


@given(st.one_of(st.text(), HARD))
def test_what_is_normalised_stays_as_it_is(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once


@given(st.text())
def test_nothing_invisible_remains_but_what_shapes_emoji(text: str) -> None:
    left = set(normalised("x" + text)) & set("\u200b\u2060\ufeff\u00ad\u202e\u200e\U000e0061")
    assert not left


@pytest.mark.parametrize("part", ["a", "a-", "a@", "a ", " ", "a1!", "\ufdfa", "a\u0301", "\u200b", "aA"])
def test_the_work_grows_with_the_length_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The passes over a text are counted; each of them is linear, its patterns have no choice to go back on.
    from lora_guard import normalise

    passes = []
    once = normalise._once
    monkeypatch.setattr(normalise, "_once", lambda text: passes.append(text) or once(text))
    normalised("\u0430" + part * 20_000)
    assert len(passes) <= 5


def test_each_message_of_a_conversation_is_normalised_and_judged_beside_the_raw_one() -> None:
    conversation = Conversation.of("b\u200bake", "Mix flour.", system="Be b\u200brief.")
    raw, plain = forms(conversation)
    assert raw is conversation
    assert [message.content for message in plain.messages] == ["Be brief.", "bake", "Mix flour."]
    assert [message.role for message in plain.messages] == ["system", "user", "assistant"]
