"""Every setting of a server: validated, read from YAML, overridden by ``key=value``."""

import ipaddress
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_guard.config import read
from lora_guard.errors import ConfigError

KEYS_VARIABLE = "LORA_GUARD_API_KEYS"
"""Environment variable with the API keys, separated by commas."""


class ServeConfig(BaseModel):
    """A server. Sizes are upper bounds; a request beyond one is refused, never cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Where
    host: str = "127.0.0.1"
    """The address to listen on; others than loopback need API keys."""
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free one."""
    allowed_hosts: list[str] = []
    """Values of the ``Host`` header to answer to, such as ``guard.example.org`` or ``*.example.org``. By default on
    loopback its own names, so that no web page can reach the server under another; elsewhere all."""
    cors_origins: list[str] = []
    """Web origins whose pages may call the server; none unless named."""
    model_name: str | None = None
    """What the server calls its model; the guard's name when absent. Requests may name any."""

    guards: dict[str, str] = {}
    """More guards on the same chat model, by the name that a request gives as its ``model``: folders or hub ids. The
    guard the server was started with answers for all other names. Torch engine only."""

    # Access
    api_keys_file: Path | None = None
    """A file with one key a line, beside the keys in the environment variable LORA_GUARD_API_KEYS."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Of one key, or of one address where there are no keys; no bound when absent."""

    # What a flag does, unless a request says
    input_mode: Literal["off", "score", "block"] = "off"
    """Moderation of prompts in chat completions that do not ask for any."""
    output_mode: Literal["off", "score", "block"] = "off"
    """Likewise of answers."""
    minimum: bool = False
    """Whether a request can only ask for more moderation than ``input_mode`` and ``output_mode``, never for less."""
    blocked_input: Literal["error", "refusal"] = "error"
    """A blocked prompt gets HTTP 400 ``content_filter``, or the ``refusal`` as an answer with that finish reason."""
    refusal: str = "I can't help with that."
    check_every: int = Field(16, ge=1)
    """An answer is checked at the latest so many tokens after the check before, and at each sentence end."""
    debounce: int = Field(1, ge=1)
    """So many flagged checks in a row flag an answer."""
    fail_open: bool = False
    """In ``block`` mode let pass what the guard failed to judge. Off, it is withheld."""

    # Limits
    max_body_bytes: int = Field(1_000_000, ge=1)
    max_messages: int = Field(256, ge=1)
    max_items: int = Field(256, ge=1)
    """Texts of one moderation request."""
    max_input_tokens: int = Field(32_768, ge=1)
    """Tokens of one moderation request, its windows' overlaps and invocations included. A chat is bounded by the
    model's context."""
    max_completion_tokens: int = Field(1024, ge=1)
    """The longest answer that a request may ask for."""
    default_completion_tokens: int = Field(256, ge=1)
    """The longest answer where a request names none."""

    # The engine
    queue: int = Field(256, ge=1)
    """Requests that are worked on or wait; one more is refused with HTTP 429."""
    chats: int = Field(8, ge=1)
    """Chats that are answered at once, in turn; each holds a key-value cache. The others wait."""
    batch_tokens: int = Field(256, ge=1)
    """Padded tokens of one batch of moderation. While chats run, a batch delays each of their tokens by its time."""
    batch_wait: float = Field(0.003, ge=0, le=1)
    """Seconds that an idle server waits for more moderation requests, to judge them in one batch."""
    batch_decode: bool = False
    """Decode the chats' tokens in one pass: faster, but an answer may then depend on those beside it."""
    deadline: float = Field(300.0, gt=0)
    """Seconds that a request may take in all."""
    guard_deadline: float = Field(30.0, gt=0)
    """Seconds that one judgement may take. A longer one counts as failed, and the server is not ready meanwhile."""
    drain: float = Field(30.0, ge=0)
    """Seconds that requests under way get to finish at shutdown."""

    # Audit
    audit: Path | None = None
    """A JSONL file with a line for each decision; none unless named."""
    audit_text: bool = False
    """Write the judged text itself, not only its hash."""
    audit_bytes: int = Field(100_000_000, ge=1000)
    """Size at which the file is rotated."""
    audit_files: int = Field(5, ge=1)
    """Rotated files that are kept."""
    audit_sync: bool = False
    """Wait for the disk at each line: it then outlives a power cut too, not only a kill."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.default_completion_tokens > self.max_completion_tokens:
            raise ValueError(
                f"default_completion_tokens {self.default_completion_tokens} exceeds max_completion_tokens "
                f"{self.max_completion_tokens}; allowed: at most that"
            )
        return self

    @classmethod
    def load(cls, path: str | Path | None, overrides: list[str]) -> Self:
        """Read a YAML file and apply ``key=value`` overrides.

        Raises:
            ConfigError: no such file, not YAML, an unknown field, a bad value, contradictory fields.
        """
        return read(cls, path, overrides)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> list[str]:
        """The values of the ``Host`` header to answer to."""
        local = ["localhost", "127.0.0.1", "[::1]", self.host]
        return self.allowed_hosts or (local if self.is_local else ["*"])

    def keys(self) -> tuple[str, ...]:
        """The API keys, from the environment and the file; none where the server is open to this machine.

        Raises:
            ConfigError: an unreadable file, one without keys, a key that no header can carry, or none at all although
                other machines can reach the server.
        """
        found = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
        if self.api_keys_file is not None:
            found += _read_keys(self.api_keys_file)
        if any(not key.isascii() or not key.isprintable() or " " in key for key in found):
            raise ConfigError("an API key holds other than visible ASCII characters; allowed: those alone")
        if not found and not self.is_local:
            raise ConfigError(
                f"host {self.host!r} can be reached by other machines; allowed without API keys: 127.0.0.1; "
                f"give keys in {KEYS_VARIABLE} or api_keys_file"
            )
        return tuple(found)


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_keys_file {path} cannot be read: {type(error).__name__}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_keys_file {path} holds no key; allowed: one a line")
    return keys
