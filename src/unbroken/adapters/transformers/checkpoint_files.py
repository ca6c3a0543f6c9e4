"""Files of a checkpoint for other programs, and a whole checkpoint as transformers writes one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import ExportableState, TrainerState

from unbroken.capture import (
    FileOf,
    decode,
    files_for,
    files_of_processor,
    load_tensors,
    named_parameters,
    structure_from_bytes,
)
from unbroken.capture.kinds.random_state import python_getstate
from unbroken.changes.differences import brief
from unbroken.checkpoint import Layout
from unbroken.errors import ConfigError, CorruptCheckpointError
from unbroken.store import CheckpointReader, export_weights
from unbroken.store.format.names import own_key, own_state_file

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
OPTIMIZER = "optimizer.pt"  # these three as the host writes them
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
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


# A checkpoint of ours written as the host's own Trainer writes one, so that it goes on from it.


_OURS = ("state.", "optimizer.", "buffers.")


def export_hf_checkpoint(reader: CheckpointReader, target: Path) -> None:
    """Write a checkpoint in the layout of the host's own Trainer: `resume_from_checkpoint=target`.

    Weights, configuration, tokenizer and trainer_state.json are copied; optimizer.pt,
    scheduler.pt and rng_state.pth are archives of `torch.save` with plain values and tensors;
    of several ranks, each has its rng_state_<rank>.pth. Sharded weights are put together.
    Every byte of the checkpoint is checked first. training_args.bin, which the host does not
    read back, is left out.

    Args:
        reader: A checkpoint that our Trainer wrote.
        target: A folder that is not there; the host wants it to be called "checkpoint-<step>".

    Raises:
        ConfigError: The folder is there, or the checkpoint is not one of the host's Trainer.
        CorruptCheckpointError: The checkpoint is damaged.
    """
    if target.exists():
        raise ConfigError(str(target), "is there already", hint="name a folder that is not")
    if reader.manifest.facts.get("host") != "transformers":
        hint = "only what `unbroken.adapters.transformers.Trainer` saved has the host's state"
        where = reader.storage.describe(reader.folder)
        raise ConfigError(where, "has no state of the Hugging Face Trainer", hint=hint)
    reader.check_rest()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [file.name for file in reader.manifest.files if not file.name.startswith(_OURS)]
    if any(name.startswith("adapter_model.rank") for name in names):
        hint = "resume on one process, and export what it saves"
        raise ConfigError(reader.folder, "holds an adapter in shards", hint=hint)
    if any(name.startswith("model.rank") for name in names):
        export_weights(reader, partial)
    for name in names:
        if not name.startswith("model.rank"):
            shutil.copyfile(reader.storage.describe(f"{reader.folder}/{name}"), partial / name)
    _write_archives(reader, partial)
    os.rename(partial, target)


def _write_archives(reader: CheckpointReader, folder: Path) -> None:
    structure = structure_from_bytes(reader.read_file("state.json"), "state.json")
    tree = decode(structure, reader, lazy=True)
    plain_optimizer = _by_position(load_tensors(tree["optimizer"].state))
    torch.save(plain_optimizer, folder / OPTIMIZER)
    plain_schedule = load_tensors(tree["scheduler"].state)
    torch.save(plain_schedule, folder / SCHEDULER)
    if "scaler" in tree:
        plain_scaler = load_tensors(tree["scaler"].state)
        torch.save(plain_scaler, folder / SCALER)
    cut: Any = reader.manifest.facts.get("cut")
    ranks = cut["world_size"]
    for rank in range(ranks):
        own = _own_tree(reader, rank)
        plain_states = _random_states(load_tensors(own.get("rng", tree["rng"])))
        name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
        torch.save(plain_states, folder / name)


def _own_tree(reader: CheckpointReader, rank: int) -> Mapping[str, Any]:
    """Return what a rank had of its own; nothing where it had the same as rank 0."""
    name = own_state_file(rank)
    if rank == 0 or name not in {file.name for file in reader.manifest.files}:
        return {}
    structure = structure_from_bytes(reader.read_file(name), name)
    tree: Mapping[str, Any] = decode(structure, reader, lazy=True)[own_key(rank)]
    return tree


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as PyTorch files it: by the places of parameters in groups."""
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers.setdefault(name, len(numbers))
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {numbers[name]: moments for name, moments in state["state"].items()},
        "param_groups": groups,
    }


def _random_states(rng: Mapping[str, Any]) -> dict[str, Any]:
    legacy = rng["numpy"]
    states = {
        "python": python_getstate(rng["python"]),
        "numpy": (
            legacy["bit_generator"],
            legacy["state"]["key"],
            legacy["state"]["pos"],
            legacy["has_gauss"],
            legacy["gauss"],
        ),
        "cpu": rng["torch"],
    }
    if rng["cuda"]:
        states["cuda"] = rng["cuda"][0] if len(rng["cuda"]) == 1 else rng["cuda"]
    return states
