"""`unbroken export`: what a checkpoint holds, for other programs."""

from __future__ import annotations

import re
from pathlib import Path

from unbroken.cli.run_paths import open_run_path
from unbroken.cli.tables import make_console, size_text
from unbroken.errors import CheckpointNotFoundError, ConfigError
from unbroken.store import CheckpointReader, export_weights

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_in(text: str, where: str) -> int:
    """Return a number of bytes that people write: "5GB", "500MB", "1000".

    Raises:
        ConfigError: It is none.

    Example:
        >>> bytes_in("5GB", "--max-file-size")
        5000000000
    """
    found = re.fullmatch(r"([0-9]+) ?([KMGT]?)B?", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise ConfigError(where, expected="a size such as 5GB or 500MB", found=text)
    return int(found[1]) * _UNITS[found[2]]


def print_export(path: str, folder: str, *, model: str, max_file_size: str) -> int:
    """Export the weights at a path into a folder, say what was written, and return 0.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ConfigError: The folder is not empty, or the size is none.
        SaveError: The disk failed or is full.
    """
    most = bytes_in(max_file_size, "--max-file-size")
    reader = _open(path)
    found = export_weights(reader, folder, model=model, max_file_bytes=most)
    console = make_console()
    many = f"{found.tensors} tensors, {size_text(found.nbytes)}"
    console.print(f"{reader.folder}: {many}, every byte verified, in {folder}:")
    for name in found.files:
        console.print(f"  {name}")
    return 0


def print_export_to_transformers(path: str, folder: str) -> int:
    """Write the checkpoint at a path as transformers' own Trainer would, and return 0.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ConfigError: The folder is there, or the checkpoint is not of the Hugging Face Trainer.
    """
    from unbroken.adapters.transformers.checkpoint_files import export_hf_checkpoint

    reader = _open(path)
    export_hf_checkpoint(reader, Path(folder))
    make_console().print(f"{reader.storage.describe(reader.folder)} -> {folder}")
    return 0


def _open(path: str) -> CheckpointReader:
    """Return the checkpoint that a path names; of a run, the newest."""
    run_path = open_run_path(path)
    reader = run_path.newest() if run_path.folder is None else run_path.open(run_path.folder)
    if reader is None:
        raise CheckpointNotFoundError(path, "holds no checkpoint that can be opened")
    return reader
