"""The files of a checkpoint that other programs read: weights, configuration, tokenizer, state."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ExportableState

from unbroken.adapters.transformers.adapters_of_peft import peft_layout
from unbroken.checkpoint import Layout
from unbroken.store.layout import is_file_name

if TYPE_CHECKING:
    from unbroken.adapters.transformers.trainer import Trainer

STATE_NAME = "trainer_state.json"
ARGUMENTS_NAME = "training_args.json"


class Folder:
    """Says what a checkpoint's folder holds besides the state of the run.

    Args:
        trainer: The trainer of this start.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._tokenizer: dict[str, bytes] | None = None

    def layout(self, objects: Mapping[str, object]) -> Layout:
        """Return where each tensor stands, and all other files."""
        model = objects["model"]
        if hasattr(model, "peft_config"):
            return peft_layout(model, objects, self._files)
        usual = Layout.of(objects)
        return dataclasses.replace(usual, files=lambda: {**usual.files(), **self._files()})

    def _files(self) -> dict[str, bytes]:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer_files(self._trainer)
        arguments: str = self._trainer.args.to_json_string()
        return {
            **self._tokenizer,
            STATE_NAME: state_as_json(self._trainer),
            ARGUMENTS_NAME: arguments.encode(),
        }


def state_as_json(trainer: Trainer) -> bytes:
    """Return trainer_state.json as the host writes it, with each callback's state once."""
    callbacks: dict[str, Any] = {}
    for one in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(one, ExportableState):
            callbacks.setdefault(type(one).__name__, []).append(one.state())
    trainer.state.stateful_callbacks = {
        name: states if len(states) > 1 else states[0] for name, states in callbacks.items()
    }
    values = dataclasses.asdict(trainer.state)
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _tokenizer_files(trainer: Trainer) -> dict[str, bytes]:
    tokenizer = trainer.processing_class
    if tokenizer is None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and is_file_name(path.name)
        }
