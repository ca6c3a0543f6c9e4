"""A second reader of the on-disk format, written from docs/format.md alone.

It shares no code with unbroken: if the two disagree, the document or the code is wrong.
"""

from __future__ import annotations

import json
import math
import struct
from itertools import product
from pathlib import Path

import xxhash

PREFIX, MIDDLE, SUFFIX = b'{"digest":"', b'","manifest":', b"}\n"


def read_manifest(folder: Path) -> dict:
    raw = (folder / "manifest.json").read_bytes()
    digest, body = raw[11:43].decode(), raw[56:-2]
    assert (raw[:11], raw[43:56], raw[-2:]) == (PREFIX, MIDDLE, SUFFIX)
    assert xxhash.xxh3_128_hexdigest(body) == digest
    manifest = json.loads(body)
    assert (manifest["format"], manifest["version"]) == ("unbroken checkpoint", 1)
    return manifest


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Return the manifest, and its tensors by path and plain files by name."""
    manifest = read_manifest(folder)
    state, shards = {}, {}
    for file in manifest["files"]:
        data = (folder / file["name"]).read_bytes()
        assert len(data) == file["nbytes"]
        regions = split(data, file["regions"])
        tensors = [
            (r, part) for r, part in zip(file["regions"], regions, strict=True) if "path" in r
        ]
        for region, part in tensors:
            if "offsets" in region:
                shards.setdefault(region["path"], []).append((region, part))
            else:
                state[region["path"]] = part
        if tensors:
            check_header(data, file["regions"])
        else:
            state[file["name"]] = data
    return manifest, state | {path: put_together(parts) for path, parts in shards.items()}


def put_together(parts: list[tuple[dict, bytes]]) -> bytes:
    """Copy each element of each shard to its place; none is missing, none is there twice."""
    region, data = parts[0]
    itemsize = len(data) // math.prod(region["shape"])
    places = {}
    for region, data in parts:
        for number, index in enumerate(product(*map(range, region["shape"]))):
            place = 0
            for at, start, size in zip(
                index, region["offsets"], region["global_shape"], strict=True
            ):
                place = place * size + at + start
            assert place not in places
            places[place] = data[number * itemsize : (number + 1) * itemsize]
    assert sorted(places) == list(range(math.prod(region["global_shape"])))
    return b"".join(places[place] for place in sorted(places))


def split(data: bytes, regions: list[dict]) -> list[bytes]:
    parts, end = [], 0
    for region in regions:
        assert region["offset"] == end
        end += region["nbytes"]
        parts.append(data[region["offset"] : end])
        assert xxhash.xxh3_128_hexdigest(parts[-1]) == region["digest"]
    assert end == len(data)
    return parts


def check_header(data: bytes, regions: list[dict]) -> None:
    """The safetensors header and the manifest tell the same of every tensor, in the same order."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + length) % 64 == 0
    told = [(t["dtype"], t["shape"], *t["data_offsets"]) for t in header.values()]
    start = 8 + length
    manifest_tells = [
        (r["dtype"], r["shape"], r["offset"] - start, r["offset"] - start + r["nbytes"])
        for r in regions[1:]
    ]
    assert told == manifest_tells


def state_digest(manifest: dict) -> str:
    regions = [(file, region) for file in manifest["files"] for region in file["regions"]]
    tensors = {
        r["path"]: [r["dtype"], r["shape"], r["digest"]]
        for _, r in regions
        if "path" in r and "offsets" not in r
    }
    for _, r in sorted(regions, key=lambda pair: pair[1].get("offsets", [])):
        if "offsets" in r:
            described = tensors.setdefault(r["path"], [r["dtype"], r["global_shape"], []])
            described[2].append([r["offsets"], r["shape"], r["digest"]])
    with_tensors = {file["name"] for file, r in regions if "path" in r}
    files = {
        file["name"]: [r["digest"] for r in file["regions"]]
        for file in manifest["files"]
        if file["name"] not in with_tensors
    }
    text = json.dumps({"files": files, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())
