"""Copies from CUDA devices into pinned memory, which run while the devices compute."""

from __future__ import annotations

import torch


class DeviceCopies:
    """Copies of one snapshot, on a stream of its own for each device.

    A copy begins when all that was launched before it on its device's current stream is done.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []

    def begin(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy a tensor; its memory stays taken until the copy is done."""
        stream = self._stream_of(source.device)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(stream)

    def hold_back(self) -> None:
        """Let what the devices are given from now on wait for the copies begun so far."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def end(self) -> None:
        """All copies are begun."""
        self._events = [(device, one.record_event()) for device, one in self._streams.items()]

    def hold_back_for_all(self) -> None:
        """Let what the devices are given from now on wait for all copies; from any thread."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self) -> None:
        """Wait for all copies; from any thread."""
        for _, event in self._events:
            event.synchronize()

    def _stream_of(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            self._streams[device] = stream
        return self._streams[device]
