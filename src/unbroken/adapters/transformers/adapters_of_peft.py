"""Models with PEFT adapters: the adapter as its own tools read it, the frozen base stored once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unbroken.capture import FileOf, files_for, named_parameters
from unbroken.checkpoint import Layout

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
