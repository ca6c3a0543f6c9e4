"""Checkpoints that are written anew with another content, each digest as it should be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from unbroken.storage import MemoryStorage, Storage
from unbroken.store.format.canonical_json import digest_of

_OPENING = b'{"digest":"'
Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Kept:
    """All files of a run directory, in memory: copied for each change."""

    files: dict[str, bytes] = field(repr=False)

    @staticmethod
    def of(storage: Storage) -> Kept:
        return Kept({path: _bytes_of(storage, path) for path in _files_in(storage, "")})

    def storage(self, **changed: bytes) -> MemoryStorage:
        """Return a new storage with these files; `changed` by path, with / spelled __."""
        storage = MemoryStorage()
        for path, data in {**self.files, **changed}.items():
            folders = path.split("/")[:-1]
            for depth in range(len(folders)):
                if storage.stat("/".join(folders[: depth + 1])) is None:
                    storage.make_folder("/".join(folders[: depth + 1]))
            storage.append(path, data)
        return storage

    def with_state(self, folder: str, change: Change) -> MemoryStorage:
        """Change the structure of the state; its digests in the manifest follow."""
        return self.with_file(folder, "state.json", change)

    def with_file(self, folder: str, name: str, change: Change) -> MemoryStorage:
        """Change a file of JSON; its digests in the manifest follow."""
        data = _spelled(change(json.loads(self.files[f"{folder}/{name}"])))
        body = self._manifest(folder)
        entry = next(file for file in body["files"] if file["name"] == name)
        region = {"digest": digest_of(data), "nbytes": len(data), "offset": 0}
        entry.update(nbytes=len(data), regions=[region])
        return self._with(folder, body, {f"{folder}/{name}": data})

    def with_facts(self, folder: str, change: Change) -> MemoryStorage:
        """Change the facts of the manifest."""
        body = self._manifest(folder)
        body["facts"] = change(body["facts"])
        return self._with(folder, body, {})

    def with_manifest(self, folder: str, change: Change) -> MemoryStorage:
        """Change the manifest as a whole, however little it then fits its files."""
        return self._with(folder, change(self._manifest(folder)), {})

    def _manifest(self, folder: str) -> Any:
        return json.loads(self.files[f"{folder}/manifest.json"])["manifest"]

    def _with(self, folder: str, body: Any, more: dict[str, bytes]) -> MemoryStorage:
        if isinstance(body, dict) and isinstance(body.get("files"), list):
            body["state_digest"] = _state_digest(body)
        raw = self.files[f"{folder}/manifest.json"]
        start = raw.index(b'"manifest":')
        spelled = _spelled(body)
        middle = raw[len(_OPENING) + 32 : start + len(b'"manifest":')]
        whole = _OPENING + digest_of(spelled).encode() + middle + spelled + raw[-2:]
        return self.storage(**{**more, f"{folder}/manifest.json": whole})


def _state_digest(body: Any) -> Any:
    """Return the digest of the state, as a manifest with these files has it."""
    from unbroken.store.format.manifest import FileEntry, Manifest

    try:
        files = tuple(FileEntry.from_json(file) for file in body["files"])
        return Manifest(0, "", "", files, {}).state_digest
    except Exception:  # no manifest could say so: let the reader find that
        return body.get("state_digest")


def _spelled(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _files_in(storage: Storage, folder: str) -> Iterator[str]:
    for name in storage.list(folder):
        path = f"{folder}/{name}" if folder else name
        if storage.stat(path).is_folder:
            yield from _files_in(storage, path)
        else:
            yield path


def _bytes_of(storage: Storage, path: str) -> bytes:
    with storage.open(path) as file:
        data = bytearray(file.nbytes)
        file.read_into(0, memoryview(data))
    return bytes(data)


JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 7, 2**31, 2**53 - 1, 1.5, -0.0, 1e300, "", "x", "cuda:9", "weight",
    [], {}, [[]], [None], {"": 0}, {"$": "tuple", "items": []}, {"$": "int", "hex": "f" * 90},
    {"$": "float", "bits": "000000000000f87f"}, {"$": "dict", "items": [[1, 2]]},
    {"$": "bytes", "hex": "00"}, {"$": "set", "items": [1]}, {"$": "torch.dtype", "name": "int64"},
    {"$": "object", "kind": "module", "class": "M", "facts": {}, "state": {}},
    {"$": "object", "kind": "stateful", "class": "M", "facts": {}, "state": None},
    {"$": "same", "as": 0},
)  # fmt: skip
"""What stands where something else is expected."""


def changed(value: Any, chance: random.Random, times: int = 1) -> Any:
    """Return a value of JSON with a few changes: junk, parts lost, exchanged, repeated, nested."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        places = list(_places(value))
        if not places:
            return chance.choice(JUNK)
        holder, key = chance.choice(places)
        _change(holder, key, places, chance)
    return value


def _change(holder: Any, key: Any, places: list[Any], chance: random.Random) -> None:
    way = chance.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1:
        other, at = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif way == 2:
        holder[key] = [holder[key]]
        for _ in range(chance.choice([1, 1, 300])):
            holder[key] = [holder[key]]
    elif way == 3 and isinstance(holder, list):
        holder.insert(key, json.loads(json.dumps(holder[key])))
    elif way == 3:
        holder[chance.choice(["x", "$", "0", f"{key}2"])] = holder.pop(key)
    elif way == 4 and type(holder[key]) in (int, float):
        holder[key] = chance.choice([-holder[key], holder[key] + 1, 2**40, str(holder[key])])
    else:
        holder[key] = json.loads(json.dumps(chance.choice(JUNK)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
