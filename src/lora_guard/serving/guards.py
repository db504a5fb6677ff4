"""The guards of a server by name, all on one chat model: which one a request means, and what is written in its name."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lora_guard.errors import InputError
from lora_guard.guard import Guard
from lora_guard.serving.results import Results


@dataclass(frozen=True)
class Served:
    """A guard under the name that requests give as their ``model``."""

    name: str
    guard: Guard
    results: Results
    """Writes its verdicts."""
    audited: dict[str, str]
    """What the audit log says of it: its name, the fingerprints of guard and chat model."""

    @classmethod
    def of(cls, name: str, guard: Guard) -> "Served":
        """The guard under a name."""
        # The spec names the hash of every file that decides a score.
        fingerprint = f"sha256:{hashlib.sha256(guard.spec.model_dump_json().encode()).hexdigest()}"
        audited = {"model": name, "guard": fingerprint, "base": guard.base_fingerprint}
        return cls(name, guard, Results(guard.taxonomy, name), audited)


class Guards:
    """A default guard and others.

    Args:
        name: of the default, which also answers for names that no guard has.
        default: loaded.
        others: by name, loaded on the default's chat model.

    Raises:
        InputError: two guards of one name.
    """

    def __init__(self, name: str, default: Guard, others: Mapping[str, Guard]) -> None:
        if name in others:
            raise InputError(f"two guards are called {name!r}; allowed: a name for each")
        self._default = name
        self._served = {key: Served.of(key, guard) for key, guard in {name: default, **others}.items()}

    @property
    def names(self) -> list[str]:
        """The default's first."""
        return list(self._served)

    def __getitem__(self, model: str | None) -> Served:
        """The guard that a request means: the one of that name, or else the default."""
        return self._served.get(model or self._default, self._served[self._default])

    def put(self, name: str, guard: Guard | None) -> Guard | None:
        """Put a guard under a name, or take the one of that name away with None.

        Returns:
            The guard that was there, if no name has it any more.

        Raises:
            InputError: the default cannot be taken away.
        """
        former = self._served.get(name)
        if guard is not None:
            self._served = {**self._served, name: Served.of(name, guard)}
        elif name == self._default:
            raise InputError(f"{name!r} is the default guard; allowed: to put another in its place")
        else:
            self._served = {key: served for key, served in self._served.items() if key != name}
        if former is None or any(served.guard is former.guard for served in self._served.values()):
            return None
        return former.guard
