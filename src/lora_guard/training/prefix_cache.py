"""The keys and values of training texts, which an activated adapter never changes: computed once, kept on the disk.

A folder for each key (base weights, render version, precision, shared opening), in it a pair of files for each process
that wrote: ``*.kv`` holds rows of bfloat16 one after the other, ``*.jsonl`` says which row lies where. A line is
written after its row, and a checksum is compared when a row is first read, so a run that was killed leaves nothing to
repair.
"""

import fcntl
import hashlib
import json
import os
import shutil
import weakref
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from lora_guard import files
from lora_guard.base_model import BaseModel
from lora_guard.default_model import cache_folder
from lora_guard.kv_cache import Prefix
from lora_guard.model import GuardModel, autocast, pad, takes_bf16
from lora_guard.render import RENDER_VERSION, shared_start

_FREE_BYTES_LEFT = 2_000_000_000
"""The disk is never filled beyond this."""


class PrefixCache:
    """Reads training texts through the frozen base model, from the disk where they lie there already.

    Args:
        model: of kind ``alora``.
        base: its chat model; its fingerprint is part of the key.
        texts: the training texts; others can be read too.
        repeated: those of them that will be read more than once, and are therefore stored; all when None.
        precision: of the guard path.
        limit: bytes on the disk; 0 computes every text each time.
        opening: how many tokens every text that will be read begins with, which are computed once and stored apart;
            all that ``texts`` share when None.
        writers: processes of the run, which share the limit.
        root: the folder of all such caches; the user's cache when None.
    """

    def __init__(
        self,
        model: GuardModel,
        base: BaseModel,
        texts: Sequence[Sequence[int]],
        *,
        precision: str,
        limit: int,
        repeated: Sequence[Sequence[int]] | None = None,
        opening: int | None = None,
        writers: int = 1,
        root: Path | None = None,
    ) -> None:
        self._model, self._pad_id, self._precision = model, base.pad_id, precision
        self._device = model.heads.weight.device
        self._shared = shared_start(texts, least=1) if opening is None else opening
        self._opening = self._compute([texts[0][: self._shared]], None) if self._shared else None
        self._store: _Store | None = None
        if limit:
            key = [base.fingerprint, RENDER_VERSION, self._dtype, list(texts[0][: self._shared])]
            example = self._compute([texts[0][: self._shared + 1]], None)
            token_bytes = sum(part.numel() // part.shape[2] for layer in example.layers for part in layer) * 2
            stored = {_key(text): len(text) - self._shared for text in (texts if repeated is None else repeated)}
            self._kept, tokens = stored.keys(), sum(stored.values())
            needed = min(limit, tokens * token_bytes)
            folder = (root or cache_folder() / "prefixes") / hashlib.sha256(str(key).encode()).hexdigest()[:16]
            self._store = _Store(folder, limit, needed, writers)

    @property
    def rows(self) -> int:
        """How many texts lie on the disk."""
        return 0 if self._store is None else len(self._store.places)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if takes_bf16(self._device, self._precision) else torch.float32

    def refresh(self) -> None:
        """Learn what other processes of the run have written."""
        if self._store is not None:
            self._store.refresh()

    def read(self, texts: Sequence[Sequence[int]]) -> Prefix:
        """Keys and values of texts, each longer than what all begin with."""
        tails = [list(text[self._shared :]) for text in texts]
        if self._store is None:
            return self._compute(tails, self._opening)
        store = self._store
        keys = [_key(text) for text in texts]
        rows = {key: row for key in keys if (row := store.get(key)) is not None}
        missing = {key: tail for key, tail in zip(keys, tails, strict=True) if key not in rows}
        if missing:
            for key, row in zip(missing, self._split(list(missing.values())), strict=True):
                if key in self._kept:
                    store.put(key, row)
                rows[key] = row
        return self._join([rows[key] for key in keys])

    def _compute(self, tails: Sequence[Sequence[int]], opening: Prefix | None) -> Prefix:
        ids, mask = pad(tails, self._pad_id)
        with autocast(self._device, self._precision):
            return self._model.read(ids.to(self._device), mask.to(self._device), opening)

    def _split(self, tails: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each text's own part, ``[layers, 2, kv_heads, tokens, head_dim]`` in bfloat16."""
        computed = self._compute(tails, self._opening)
        pairs = [torch.stack([part.to("cpu", torch.bfloat16) for part in layer]) for layer in computed.layers]
        stacked = torch.stack(pairs)[..., self._shared :, :]
        return [stacked[:, :, row, :, : len(tail)] for row, tail in enumerate(tails)]

    def _join(self, rows: Sequence[Tensor]) -> Prefix:
        """A padded batch of the opening and each row; what did not fit on the disk is rounded like what did."""
        layers, _, heads, _, width = rows[0].shape
        lengths = torch.tensor([self._shared + row.shape[3] for row in rows])
        joined = torch.zeros(layers, 2, len(rows), heads, int(lengths.max()), width, dtype=self._dtype)
        if self._opening is not None:
            for place, pair in enumerate(self._opening.layers):
                for side, part in enumerate(pair):
                    joined[place, side, :, :, : self._shared] = part
        for place, row in enumerate(rows):
            joined[:, :, place, :, self._shared : self._shared + row.shape[3]] = row
        joined = joined.to(self._device)
        return Prefix([(layer[0], layer[1]) for layer in joined], lengths.to(self._device))


def _key(text: Sequence[int]) -> str:
    return hashlib.sha256(np.array(text, dtype=np.int64).tobytes()).hexdigest()[:32]


class _Place(NamedTuple):
    file: Path
    offset: int
    shape: tuple[int, ...]
    checksum: int


class _Store:
    """Rows on the disk, found by a key."""

    def __init__(self, folder: Path, limit: int, needed: int, writers: int) -> None:
        self.places: dict[str, _Place] = {}
        self._folder = folder
        self._files = ExitStack()
        weakref.finalize(self, self._files.close)
        self._name = f"{os.getpid()}-{uuid4().hex[:8]}"
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = self._files.enter_context((folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_SH)  # held as long as this object lives: see _make_room
        _make_room(folder, limit, needed)
        self._allowed = max(0, limit - _size(folder.parent)) // writers
        self._checked: set[str] = set()
        self._data: IO[bytes] | None = None
        self._index: IO[str] | None = None
        self.refresh()

    def refresh(self) -> None:
        for index in self._folder.glob("*.jsonl"):
            data = index.with_suffix(".kv")
            size = data.stat().st_size if data.is_file() else 0
            for line in index.read_text("utf-8").splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # a kill cut it short
                key, offset, shape, checksum = json.loads(line)
                if offset + 2 * int(np.prod(shape)) <= size:
                    self.places.setdefault(key, _Place(data, offset, tuple(shape), checksum))

    def get(self, key: str) -> Tensor | None:
        """A row, mapped from the disk; None if it is not there or not what was written."""
        place = self.places.get(key)
        if place is None:
            return None
        # Copy-on-write, since torch takes no read-only memory; nobody writes to it.
        row = np.memmap(place.file, dtype=np.int16, mode="c", offset=place.offset, shape=place.shape)
        if key not in self._checked:
            if zlib.crc32(row.data) != place.checksum:
                del self.places[key]
                return None
            self._checked.add(key)
        return torch.from_numpy(row).view(torch.bfloat16)

    def put(self, key: str, row: Tensor) -> None:
        """Write a row unless the limit or the disk has no room for it."""
        data = row.contiguous().view(torch.int16).numpy().tobytes()
        if len(data) > self._allowed or shutil.disk_usage(self._folder).free < len(data) + _FREE_BYTES_LEFT:
            return
        with files.writing(self._folder):
            if self._data is None or self._index is None:
                open_file = self._files.enter_context
                self._data = open_file((self._folder / f"{self._name}.kv").open("ab"))
                self._index = open_file((self._folder / f"{self._name}.jsonl").open("a", encoding="utf-8"))
            offset = self._data.tell()
            self._data.write(data)
            self._data.flush()
            place = _Place(self._folder / f"{self._name}.kv", offset, tuple(row.shape), zlib.crc32(data))
            self._index.write(json.dumps([key, offset, list(place.shape), place.checksum]) + "\n")
            self._index.flush()
        self._allowed -= len(data)
        self.places[key] = place


def _make_room(folder: Path, limit: int, needed: int) -> None:
    """Delete caches of other keys, oldest first, until this one has what it needs; never those in use."""
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    for other in sorted(others, key=lambda path: path.stat().st_mtime):
        if limit - _size(folder.parent) >= needed - _size(folder):
            return
        with (other / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(other, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.kv"))
