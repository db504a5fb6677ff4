"""Stop sequences: text streams up to the first of them, and what may be the beginning of one waits."""

from collections.abc import Sequence


class StopText:
    """Passes text on until one of the stop sequences occurs in it, whatever the pieces it arrives in.

    Args:
        sequences: the texts that end the stream; none of them is empty.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self.reached = False
        self._sequences = sequences
        self._held = ""

    def push(self, text: str) -> str:
        """Take in a piece; the text that is certain to stand before any stop sequence."""
        self._held += text
        found = [at for at in map(self._held.find, self._sequences) if at >= 0]
        if found:
            self.reached = True
            before, self._held = self._held[: min(found)], ""
            return before
        kept = max((_overlap(self._held, sequence) for sequence in self._sequences), default=0)
        certain = len(self._held) - kept
        before, self._held = self._held[:certain], self._held[certain:]
        return before

    def rest(self) -> str:
        """At the end of the stream: the text that waited to become a stop sequence and did not."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, sequence: str) -> int:
    """The length of the longest end of the text that begins the sequence."""
    longest = min(len(text), len(sequence) - 1)
    return next((size for size in range(longest, 0, -1) if sequence.startswith(text[-size:])), 0)
