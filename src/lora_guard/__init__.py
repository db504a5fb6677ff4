"""The public names, each imported on first use: ``import lora_guard`` loads neither torch nor transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ChatEnd",
    "Check",
    "Conversation",
    "Guard",
    "LoraGuardError",
    "Message",
    "StreamSettings",
    "Taxonomy",
    "TrainConfig",
    "Verdict",
    "__version__",
]

if TYPE_CHECKING:
    from lora_guard.config import TrainConfig
    from lora_guard.conversation import Conversation, Message
    from lora_guard.engine.stream import ChatEnd, Check, StreamSettings
    from lora_guard.errors import LoraGuardError
    from lora_guard.guard import Guard
    from lora_guard.taxonomy import Taxonomy
    from lora_guard.verdict import Verdict

    __version__: str
else:
    # Hidden from type checkers, to which a module with __getattr__ has every name.

    _HOME = {
        "ChatEnd": "engine.stream",
        "Check": "engine.stream",
        "Conversation": "conversation",
        "Guard": "guard",
        "LoraGuardError": "errors",
        "Message": "conversation",
        "StreamSettings": "engine.stream",
        "Taxonomy": "taxonomy",
        "TrainConfig": "config",
        "Verdict": "verdict",
    }

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version  # a third of the import's time, for a name seldom asked for

            return version("lora-guard")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
