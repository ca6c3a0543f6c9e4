"""How each method saves a model with its optimizer, and loads it: one place for all benchmarks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from peers.method import Method

_PLACES = {
    "unbroken overlap": "ours:Overlap",
    "unbroken async": "ours:Async",
    "unbroken blocking": "ours:Blocking",
    "torch.save": "files:TorchSave",
    "safetensors": "files:Safetensors",
    "dcp.save": "dcp:Blocking",
    "dcp.async_save thread": "dcp:Thread",
    "dcp.async_save thread, staging reused": "dcp:ThreadReused",
    "dcp.async_save thread, staging overlapped": "dcp:ThreadOverlapped",
    "dcp.async_save process, staging reused": "dcp:ProcessReused",
    "dcp.async_save process, staging overlapped": "dcp:ProcessOverlapped",
    "torch_checkpointing async": "manager:Manager",
    "transformers": "hosts:Transformers",
    "Lightning": "hosts:Lightning",
    "Lightning async": "hosts:LightningAsync",
}
SAVING = tuple(_PLACES)
LOADING = (
    "unbroken blocking",
    "torch.save",
    "safetensors",
    "dcp.save",
    "torch_checkpointing async",
    "transformers",
    "Lightning",
)


def make(name: str, model, optimizer, folder: Path) -> Method:
    """Return a method, ready to save and load this model."""
    module, _, of_it = _PLACES[name].partition(":")
    return getattr(import_module(f"peers.{module}"), of_it)(model, optimizer, folder)
