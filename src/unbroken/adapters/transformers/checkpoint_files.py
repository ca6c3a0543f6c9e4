"""The files of a checkpoint that other programs read: weights, configuration, tokenizer, state."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_callback import ExportableState, TrainerState

from unbroken.capture import FileOf, files_for, files_of_processor, named_parameters
from unbroken.changes.differences import brief
from unbroken.checkpoint import Layout
from unbroken.errors import CorruptCheckpointError

# Models with PEFT adapters: the adapter as its own tools read it, the frozen base stored once.


FROZEN = "frozen.safetensors"
ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def peft_layout(
    model: Any, objects: Mapping[str, object], more: Callable[[], Mapping[str, bytes]]
) -> Layout:
    """Return the layout of a model that trains an adapter.

    What is trained stands in adapter_model.safetensors under the names that PEFT gives it, so
    that `PeftModel.from_pretrained(base, checkpoint)` and `base.load_adapter(checkpoint)` read it.
    All else of the model stands in frozen.safetensors, which is linked from checkpoint to
    checkpoint as long as it is the same.

    Args:
        model: The `PeftModel`, or a model of transformers with `add_adapter` called on it.
        objects: All objects of the run.
        more: More files.
    """
    names, usual = _names_in_adapter(model), files_for(objects)

    def file_of(path: str) -> tuple[str, str]:
        file, name = usual(path)
        if file != "model.safetensors":
            return file, name
        return (ADAPTER, names[name]) if name in names else (FROZEN, name)

    place: FileOf = file_of
    return Layout(
        place, constant=frozenset({FROZEN}), files=lambda: {**_description(model), **more()}
    )


def _names_in_adapter(model: Any) -> dict[str, str]:
    """Return for each tensor of the adapter the name that PEFT stores it under."""
    names = {id(tensor): name for name, tensor in tensors_of_adapter(model).items()}
    pairs = ((name, names.get(id(parameter))) for name, parameter in named_parameters(model))
    return {name: own for name, own in pairs if own is not None}


def tensors_of_adapter(model: Any) -> dict[str, Any]:
    """Return the tensors of the active adapter by the names that PEFT stores them under."""
    from peft import get_peft_model_state_dict

    live = model.state_dict(keep_vars=True)
    active = {"adapter_name": _active_adapter(model)}
    stored = get_peft_model_state_dict(model, state_dict=live, **active)
    prefix = "" if _is_wrapped(model) else _PREFIX  # as transformers itself adds it
    return {prefix + name: tensor for name, tensor in stored.items()}


def load_adapter(model: Any, stored: Mapping[str, Any]) -> None:
    """Put tensors of a file of PEFT's into the active adapter."""
    from peft import set_peft_model_state_dict

    cut = "" if _is_wrapped(model) else _PREFIX
    bare = {name.removeprefix(cut): tensor for name, tensor in stored.items()}
    set_peft_model_state_dict(model, bare, adapter_name=_active_adapter(model))


def _is_wrapped(model: Any) -> bool:
    """Return whether it is a `PeftModel`, and no model that has adapters in itself."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _active_adapter(model: Any) -> str:
    if _is_wrapped(model):
        return str(model.active_adapter)
    return str(model.active_adapters()[0])


def _description(model: Any) -> dict[str, bytes]:
    """Return adapter_config.json, written by PEFT itself, and what else the host puts there."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.peft_config[_active_adapter(model)]
        before, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(folder)
        finally:
            config.inference_mode = before
        if not _is_wrapped(model) and model.can_generate():
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).glob("*.json")}


STATE_NAME = "trainer_state.json"
ARGUMENTS_NAME = "training_args.json"


class CheckpointFiles:
    """Says what a checkpoint's folder holds besides the state of the run."""

    def __init__(self, host: transformers.Trainer) -> None:
        self._host = host
        self._tokenizer: dict[str, bytes] | None = None

    def layout(self, objects: Mapping[str, object]) -> Layout:
        """Return where each tensor stands, and all other files."""
        model = objects["model"]
        if hasattr(model, "peft_config"):
            return peft_layout(model, objects, self._files)
        return Layout.of(objects).with_files(self._files)

    def _files(self) -> dict[str, bytes]:
        host = self._host
        if self._tokenizer is None:
            self._tokenizer = _tokenizer_files(host.processing_class, host.data_collator)
        arguments: str = host.args.to_json_string()
        return {
            **self._tokenizer,
            STATE_NAME: state_as_json(host.state, (*host.callback_handler.callbacks, host.control)),
            ARGUMENTS_NAME: arguments.encode(),
        }


def state_as_json(state: Any, callbacks: Iterable[Any]) -> bytes:
    """Return trainer_state.json as the host writes it, with each callback's state once."""
    found: dict[str, Any] = {}
    for one in callbacks:
        if isinstance(one, ExportableState):
            found.setdefault(type(one).__name__, []).append(one.state())
    state.stateful_callbacks = {
        name: states if len(states) > 1 else states[0] for name, states in found.items()
    }
    values = dataclasses.asdict(state)
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def state_from_json(data: bytes, step: int) -> dict[str, Any]:
    """Return what `state_as_json` has written at a step.

    Raises:
        CorruptCheckpointError: It is something else, or of another step.
    """
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(STATE_NAME, "is no JSON", found=str(error)) from error
    if not isinstance(state, dict) or state.get("global_step") != step:
        found = state.get("global_step") if isinstance(state, dict) else type(state).__name__
        raise CorruptCheckpointError(STATE_NAME, "global_step", expected=step, found=found)
    for name, (expected, kinds) in _KINDS.items():
        if name in state and type(state[name]) not in kinds:
            found = brief(repr(state[name]))
            raise CorruptCheckpointError(STATE_NAME, name, expected=expected, found=found)
    if not all(isinstance(line, dict) for line in state.get("log_history", [])):
        raise CorruptCheckpointError(STATE_NAME, "log_history", expected="lines by name")
    try:
        TrainerState(**state)  # the host reads it, too
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        what = "is no state that this version of transformers reads"
        raise CorruptCheckpointError(STATE_NAME, what, found=brief(str(error))) from error
    return state


_NONE = type(None)
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "global_step": ("a number of steps", (int,)),
    **dict.fromkeys(("epoch", "num_input_tokens_seen", "total_flos"), ("a number", (int, float))),
    "best_metric": ("a number, or null", (int, float, _NONE)),
    **dict.fromkeys(
        ("best_global_step", "train_batch_size"), ("a whole number, or null", (int, _NONE))
    ),
    "log_history": ("a list", (list,)),
}
"""What stands in trainer_state.json of what goes on, unless an older version left it out."""


def _tokenizer_files(tokenizer: Any, collator: Any) -> dict[str, bytes]:
    """Return the files of the tokenizer; where the trainer has none, of its collator's."""
    if tokenizer is None:
        tokenizer = getattr(collator, "tokenizer", None)
    return {} if tokenizer is None else files_of_processor(tokenizer)
