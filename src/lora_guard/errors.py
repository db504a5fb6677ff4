"""The exceptions users meet: each message is one line that says what is wrong, where, and what is allowed.

LoraGuardError
├── ConfigError      a setting: unknown field, bad value, contradictory fields
├── InputError       a conversation, message or request given at call time
├── DataError        a data file: missing, empty, a bad row (with file and line)
├── ModelError       a base model that cannot be found, loaded or rendered for
├── ArtifactError    a guard folder: missing, corrupted, made for another base
├── ResourceError    the machine: no disk space, no memory for a batch
├── GuardError       a judgement that failed, took too long, or is not a number
├── DeadlineError    a request that took longer than it may
└── BusyError        a server that takes no more work now
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LoraGuardError(Exception):
    """Base of every error this package raises on purpose; the CLI prints its text as one line."""


class ConfigError(LoraGuardError):
    """A setting is unknown, has a value outside what is allowed, or contradicts another."""


class InputError(LoraGuardError):
    """A conversation or request cannot be judged as given."""


class DataError(LoraGuardError):
    """A data file is missing, empty, unreadable or holds a bad row."""


class ModelError(LoraGuardError):
    """A base model cannot be found, loaded or rendered for."""


class ArtifactError(LoraGuardError):
    """A guard folder is missing, incomplete, corrupted or made for another base model."""


class ResourceError(LoraGuardError):
    """The machine lacks disk space or memory for what was asked."""


class GuardError(LoraGuardError):
    """The guard gave no verdict; what is not judged counts as unsafe wherever something is blocked."""


class DeadlineError(LoraGuardError):
    """A request was not done by its deadline."""


class BusyError(LoraGuardError):
    """A server's queue is full, or it is shutting down.

    Args:
        message: one line.
        retry_after: seconds after which another try makes sense; None where the server can't know.
    """

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def allowed(value: object, options: Iterable[str]) -> str:
    """Say which options are allowed, nearest first: ``did you mean 'lora'? allowed: lora, none``."""
    options = list(options)
    nearest = get_close_matches(str(value), options, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}allowed: {', '.join(options)}"


@contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """Turn a failed allocation for ``what`` into a ResourceError; torch raises one of several types for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
            raise ResourceError(f"no memory for {what}; allowed: what fits, try a smaller batch or window") from error
        raise
