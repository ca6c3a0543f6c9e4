"""A small training, done again and again: are the bits the same?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from unbroken.cli.doctor.finding import Finding
from unbroken.errors import UnbrokenError
from unbroken.store.format.canonical_json import Digester
from unbroken.training.setup import deterministic_kernels

_STEPS, _BATCH, _LENGTH, _WORDS, _WIDTH = 3, 64, 64, 64, 32
_IN_A_PROCESS = "from unbroken.cli.doctor.experiment import train; print(train('{device}'))"

Train = Callable[[str], str]
"""From the name of a device to the digest of a model that was trained on it."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment has shown.

    Attributes:
        question: What was asked.
        device: Where: "cpu" or "cuda".
        yes: The answer.
        wanted: The answer that bit-exactness needs; None: both are fine.
    """

    question: str
    device: str
    yes: bool
    expected: bool | None

    def findings(self) -> Iterator[Finding]:
        """Yield what follows from the answer."""
        if self.expected is None or self.yes == self.expected:
            return
        yield Finding(
            "breaks",
            f"{self.device}: {self.question}: {'yes' if self.yes else 'no'}",
            "a small training, with deterministic kernels and the same seeds, did not repeat its "
            "own bits here: nor will a larger one",
            "try torch's newest release and driver; an unstable or overclocked processor or memory "
            "also shows like this",
        )


def train(device: str) -> str:
    """Train a small model for a few steps; return the digest of all its parameters.

    Embedding, normalisation, products, dropout, loss, backward and AdamW, with deterministic
    kernels, large enough that more than one thread takes part.

    Args:
        device: "cpu" or "cuda".
    """
    with deterministic_kernels(True, torch.device(device)):
        torch.manual_seed(0)
        model = _make_model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(_STEPS):
            words = torch.randint(_WORDS, (_BATCH, _LENGTH)).to(device)
            predicted = model(words).flatten(0, 1)
            loss = nn.functional.cross_entropy(predicted, words.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return _digest(model)


def _make_model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(_WORDS, _WIDTH),
        nn.LayerNorm(_WIDTH),
        nn.Linear(_WIDTH, 4 * _WIDTH),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(4 * _WIDTH, _WIDTH),
        nn.LayerNorm(_WIDTH),
        nn.Linear(_WIDTH, _WORDS),
    )


def _digest(model: nn.Module) -> str:
    digester = Digester()
    for parameter in model.parameters():
        digester.update(parameter.detach().cpu().numpy().tobytes())
    return digester.digest()


def train_in_a_process(device: str) -> str:
    """Do `train` in a fresh process.

    Raises:
        UnbrokenError: It failed there.
    """
    command = [sys.executable, "-c", _IN_A_PROCESS.format(device=device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        found = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise UnbrokenError(f"training in a fresh process on {device}", "failed", found=found)
    return done.stdout.strip()


def run_experiments(
    *, cores: int, thorough: bool, train: Train = train, train_afresh: Train = train_in_a_process
) -> list[Experiment]:
    """Train on each kind of device, and answer whether the bits are the same.

    Args:
        cores: How many this process may use.
        thorough: Also in two fresh processes.
        train: What to repeat in this process.
        train_afresh: What to repeat in others.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    answers = []
    for device in devices:
        here = [train(device) for _ in range(2)]
        answers.append(Experiment("the same bits twice", device, len({*here}) == 1, expected=True))
        if thorough:
            all_of_them = {*here, train_afresh(device), train_afresh(device)}
            question = "the same bits in two other processes"
            answers.append(Experiment(question, device, len(all_of_them) == 1, expected=True))
    return [*answers, *_threads(train, cores)]


def _threads(train: Train, cores: int) -> Iterator[Experiment]:
    threads = torch.get_num_threads()
    others = threads if threads > 1 else cores
    if others == 1:
        return  # nothing to compare with
    try:
        torch.set_num_threads(1)
        alone = train("cpu")
        torch.set_num_threads(others)
        together = train("cpu")
    finally:
        torch.set_num_threads(threads)
    question = f"depends on the number of threads (1 or {others})"
    yield Experiment(question, "cpu", alone != together, expected=None)
