"""Stop sequences: what leaves is the text before the first of them, however the text is cut into pieces."""

from hypothesis import given
from hypothesis import strategies as st

from lora_guard.engine.stop import StopText


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_the_stream_ends_before_the_sequence_that_is_complete_first(pieces: list[str], sequences: list[str]) -> None:
    stops = StopText(sequences)
    passed = ""
    taken = ""
    for piece in pieces:
        passed += stops.push(piece)
        taken += piece
        if stops.reached:
            break
    passed += stops.rest()
    starts = [at for at in map(taken.find, sequences) if at >= 0]
    assert stops.reached == bool(starts)
    assert passed == (taken[: min(starts)] if starts else taken)


def test_only_what_may_begin_a_sequence_waits() -> None:
    stops = StopText(["END"])
    assert stops.push("the E") == "the "
    assert stops.push("N") == ""
    assert stops.push("T") == "ENT"
    assert stops.push(" EN") == " "
    assert stops.rest() == "EN"
