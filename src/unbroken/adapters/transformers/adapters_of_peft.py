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


def peft_layout(
    model: Any, objects: Mapping[str, object], more: Callable[[], Mapping[str, bytes]]
) -> Layout:
    """Return the layout of a model that trains an adapter.

    What is trained stands in adapter_model.safetensors under the names that PEFT gives it, so
    that `PeftModel.from_pretrained(base, checkpoint)` reads it. All else of the model stands in
    frozen.safetensors, which is linked from checkpoint to checkpoint as long as it is the same.

    Args:
        model: The `PeftModel`.
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
    from peft import get_peft_model_state_dict

    live = model.state_dict(keep_vars=True)
    stored = get_peft_model_state_dict(model, state_dict=live)
    names = {id(tensor): name for name, tensor in stored.items()}
    pairs = ((name, names.get(id(parameter))) for name, parameter in named_parameters(model))
    return {name: own for name, own in pairs if own is not None}


def _description(model: Any) -> dict[str, bytes]:
    """Return adapter_config.json, written by PEFT itself."""
    with tempfile.TemporaryDirectory() as folder:
        active = model.active_adapter
        config = model.peft_config[active]
        before, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(folder)
        finally:
            config.inference_mode = before
        return {path.name: path.read_bytes() for path in Path(folder).glob("*.json")}
