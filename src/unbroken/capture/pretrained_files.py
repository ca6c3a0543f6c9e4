"""The files beside the weights that `from_pretrained` needs: of a model, and of its tokenizer."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from unbroken.capture.dtypes import dtype_name
from unbroken.capture.kinds.modules import unwrapped
from unbroken.capture.sharded import class_of
from unbroken.errors import CaptureError, ConfigError
from unbroken.store.format.names import is_file_name


def pretrained_files(model: object) -> dict[str, bytes]:
    """Return config.json and generation_config.json of a Hugging Face model; else nothing.

    A model is one if it has a `config` with `to_json_string()`; transformers is not imported, and
    the live configuration is not changed.

    Args:
        model: Any object; wrappers such as DDP are looked through.

    Returns:
        By file name, the bytes.

    Raises:
        CaptureError: The configuration holds what cannot be written.

    Example:
        >>> pretrained_files(nn.Linear(2, 1))
        {}
    """
    if not isinstance(model, nn.Module):
        return {}
    model = unwrapped(model)
    try:
        config = getattr(model, "config", None)
    except Exception:  # a property of the user's, and so of no Hugging Face model
        return {}
    if not callable(getattr(type(config), "to_json_string", None)):
        return {}
    try:
        return _files(model, config)
    except Exception as error:
        raise CaptureError(
            "model.config",
            "cannot be written for from_pretrained",
            found=f"{type(error).__name__}: {error}",
            hint="a configuration holds plain values: numbers, texts, lists and dicts of them",
        ) from error


def files_of_processor(processor: object) -> dict[str, bytes]:
    """Return the files that a tokenizer, or another processor of Hugging Face, saves itself in.

    Args:
        processor: Anything with `save_pretrained(folder)`.

    Returns:
        By file name, the bytes; without folders in the folder.

    Raises:
        ConfigError: It has no such method.

    Example:
        >>> files_of_processor("gpt2")
        Traceback (most recent call last):
            ...
        unbroken.errors.ConfigError: processing_class: expected save_pretrained(folder), found str
    """
    save = getattr(processor, "save_pretrained", None)
    if not callable(save):
        expected, found = "save_pretrained(folder)", type(processor).__name__
        raise ConfigError("processing_class", expected=expected, found=found)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and is_file_name(path.name)
        }


def _files(model: nn.Module, config: Any) -> dict[str, bytes]:
    files = {"config.json": _config(model, config)}
    generation = getattr(model, "generation_config", None)
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and can_generate() and generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def _config(model: nn.Module, config: Any) -> bytes:
    """Return the configuration as `save_pretrained` writes it, with the class and the dtype."""
    config = copy.deepcopy(config)
    config.architectures = [class_of(model).__name__]
    dtype = getattr(model, "dtype", None)
    if dtype is not None:
        config.dtype = dtype_name(dtype)
    text: str = config.to_json_string()
    return text.encode()
