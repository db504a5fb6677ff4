"""Undoes the disguises that text is put in to slip past a guard: what is judged beside the text as it came.

A guard reads tokens, and one invisible character inside a word makes other tokens of it. Normalising loses what some
languages and emoji need, so nothing judges the normalised text alone: the raw text is judged too, and the higher score
counts.
"""

import re
import unicodedata

from lora_guard.conversation import Conversation, Message

NORMALISE_VERSION = 2
"""Counts the changes of what normalising gives: logits that an evaluation keeps are those of one version."""


def normalised(text: str) -> str:
    """The text without disguises; equal to ``text`` where there are none.

    In turn, until nothing changes: letters that stand apart become words again; compatibility characters become plain
    ones (NFKC); invisible characters, direction marks and stray combining marks go; look-alikes of Latin letters become
    these; digits and signs that stand for letters inside a word become these; sentences in capitals or mixed case
    become lower case. Long runs like those of base64 say nothing about letters. What is normalised stays as it is.
    """
    while (plain := _once(text)) != text:
        text = plain
    return text


def forms(conversation: Conversation) -> list[Conversation]:
    """What is judged of a conversation: itself and, where normalising changes a message, its normalised form."""
    plain = Conversation(tuple(Message(message.role, normalised(message.content)) for message in conversation.messages))
    return [conversation] if plain == conversation else [conversation, plain]


def _once(text: str) -> str:
    text = _joined(_CONTROL.sub("", text))  # before NFKC, which makes several characters of one
    if not text.isascii():
        text = _in_latin(_without_invisible(unicodedata.normalize("NFKC", text)))
    return _in_lower_case(_unleet(text))


def _without_invisible(text: str) -> str:
    return _INVISIBLE.sub(lambda match: match[0] if _belongs_to_emoji(match) else "", text)


def _belongs_to_emoji(match: re.Match[str]) -> bool:
    """Whether the joiner or selector shapes the emoji before it; a longer run of them hides something."""
    before = match.string[match.start() - 1 : match.start()]
    return match[0] in _EMOJI_SHAPERS and before != "" and unicodedata.category(before) in ("So", "Sk")


def _in_latin(text: str) -> str:
    """Fold look-alikes: letters of other scripts only in words, or texts, that are Latin otherwise."""
    text = text.translate(_LATIN_VARIANTS)
    letters = sum(map(str.isalpha, text))
    mostly_latin = 2 * len(_ASCII_LETTER.findall(text)) > letters

    def folded(match: re.Match[str]) -> str:
        word = match[0]
        return word.translate(_LOOK_ALIKES) if mostly_latin or _ASCII_LETTER.search(word) else word

    return _LETTERS.sub(folded, text)


def _joined(text: str) -> str:
    """Close the gaps between letters that stand apart, ``h o w   t o`` and ``h-o-w``; wider gaps part words."""
    return _DOTTED.sub(lambda match: re.sub(r"[\W_]", "", match[0]), _SPACED.sub(_close_gaps, text))


def _close_gaps(match: re.Match[str]) -> str:
    run = match[0]
    if len(_LETTER.findall(run)) < 3:
        return run
    narrow = min(map(len, re.findall(" +", run)))
    return re.sub(" +", lambda gap: "" if len(gap[0]) == narrow else " ", run)


def _unleet(text: str) -> str:
    """Letters for the digits and signs that stand for them, in all words once one has them between letters."""
    words = text.split(" ")
    if not any(_LEET_INSIDE.search(word) and not _NO_WORD.search(word) for word in words):
        return text
    return " ".join(
        word
        if _NO_WORD.search(word) or not _ASCII_LETTER.search(word)
        else _LEET.sub(lambda sign: sign[0].translate(_LEET_LETTERS), word)
        for word in words
    )


def _in_lower_case(text: str) -> str:
    return _SENTENCE.sub(lambda match: _lowered(match[0]) if _has_odd_case(match[0]) else match[0], text)


def _lowered(sentence: str) -> str:
    """In lower case but for what is encoded, where a letter's case is its value."""
    return "".join(part if _ENCODED.fullmatch(part) else part.lower() for part in _ENCODED_PARTS.split(sentence))


def _has_odd_case(sentence: str) -> bool:
    """Whether half of its words have capitals behind their first letter."""
    words = _WORD.findall(_ENCODED.sub("", sentence))
    return len(words) > 2 and 2 * sum(word[1:] != word[1:].lower() for word in words) >= len(words)


def _aligned(pairs: str) -> dict[int, str]:
    """A translation table of ``LETTERS:look-alikes`` groups, the n-th letter for the n-th look-alike."""
    table = {}
    for group in pairs.split():
        letters, _, others = group.partition(":")
        table.update({ord(other): letter for letter, other in zip(letters, others, strict=True)})
    return table


_ASCII_LETTER = re.compile("[A-Za-z]")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE = re.compile(r"[^.!?\n]+")
_LETTERS = re.compile(r"[^\W\d_]+")

# Unicode's Default_Ignorable_Code_Point, tag characters among them, the annotation marks, and combining marks that
# belong to no letter of their own (struck-out text).
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\u0300-\u036f]+"
)
_EMOJI_SHAPERS = ("\ufe0f", "\u200d", "\ufe0f\u200d")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")

# Single characters with blanks between them, and letters with one sign between them.
_SPACED = re.compile(r"(?<!\S)\S(?: +\S(?!\S)){2,}")
_DOTTED = re.compile(r"(?<![^\W_])[^\W\d_](?P<sign>[-._*|/~\u00b7\u2022])[^\W\d_](?:(?P=sign)[^\W\d_])+(?![^\W_])")

_LEET_LETTERS = str.maketrans("013457@$!", "oieastasi")
_LEET_INSIDE = re.compile(r"[A-Za-z][013457@$]{1,2}[A-Za-z]|[a-z]![a-z]")
_LEET = re.compile(r"[013457@$]|!(?=\w)")  # an exclamation mark at the end of a word is one
_ENCODED = re.compile(r"[A-Za-z0-9+/=]{40,}")
_ENCODED_PARTS = re.compile(f"({_ENCODED.pattern})")
_NO_WORD = re.compile(rf"://|www\.|@[\w-]+\.|{_ENCODED.pattern}")

# Small capitals and other shapes of Latin letters that no language writes words in; NFKC leaves them.
_LATIN_VARIANTS = _aligned("abcdefghijklmnoprstuvwyzag:ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢɑɡ ") | {
    first + place: letter for first in (0x1F150, 0x1F170) for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
}

# By look alone, whatever the sound: Cyrillic, Greek, Armenian, Cherokee.
_LOOK_ALIKES = _aligned(
    "aeopcyyxijshdqwkmtbhrnbv:аеорсуүхіјѕһԁԛԝкмтвнгпьѵ ABEKMHOPCTYXIJSQWYF:АВЕКМНОРСТУХІЈЅԚԜҮҒ "
    "abyeniikvopctuxw:αβγεηιίκνορςτυχω ABEZHIKMNOPTYX:ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ ounhgqp:օսոհցզք "
    "ABCDEGHJKLMPRSTVWZ:ᎪᏴᏟᎠᎬᏀᎻᎫᏦᏞᎷᏢᎡᏚᎢᏙᎳᏃ"
)
