"""In a hand-written loop the data are compared, as in the Trainer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler, WeightedRandomSampler

from unbroken import Checkpointer, batch_source
from unbroken.checkpoint import ResumePolicy, ResumeReport
from unbroken.errors import DataError, DifferenceError
from unbroken.fingerprint import sampled_records


class Points(Dataset):
    def __init__(self, seed: int = 0, noise: float = 0.1, n: int = 64, own: bool = False) -> None:
        self.x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
        self.noise = noise
        self.rng = np.random.default_rng(1) if own else None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        shift = 0.0 if self.rng is None else self.rng.random()
        return self.x[index] + self.noise * torch.randn(8) + shift


class Seldom(Points):
    """Draws from a generator of its own, which seldom shows."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index] * (0.0 if self.rng.random() < 1e-9 else 1.0)


class SeededByIndex(Points):
    """A generator of its own that gives each sample the same numbers each time."""

    def __getitem__(self, index: int) -> torch.Tensor:
        self.rng = np.random.default_rng(index)
        return self.x[index] + self.rng.random()


class Scaled:
    """A collator; with a generator of its own it is never the same twice."""

    def __init__(self, scale: float = 1.0, own: bool = False) -> None:
        self.scale = scale
        self.rng = np.random.default_rng(1) if own else None

    def __call__(self, samples: list) -> torch.Tensor:
        noise = float(torch.rand(())) if self.rng is None else self.rng.random()
        return torch.stack([samples.pop() for _ in range(len(samples))]) * (self.scale + noise)


def numbers(scale: float):
    def batches():
        for number in range(16):
            yield torch.full((4, 8), number * scale)

    return batches


def train(
    folder, data, steps: int, collate=None, policy=None, wrap=True, **options
) -> ResumeReport:
    """A loop as the README has it, up to so many steps, and a save."""
    return trained(folder, data, steps, collate, policy, wrap, **options)[0]


def trained(folder, data, steps: int, collate=None, policy=None, wrap=True, **options):
    """The same; the weights besides."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if wrap:
        data = batch_source(data, seed=0, global_batch_size=4, collate_fn=collate, **options)
    with Checkpointer(folder, resume=policy, model=model, optimizer=optimizer, data=data) as saver:
        report = saver.resume()
        for step, batch in enumerate(data.iterate() if wrap else data, report.step):
            if step >= steps:
                break
            model(batch.data if wrap else batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if wrap:
                data.used(batch)
        saver.save(steps)
    return report, model.weight.detach().numpy().tobytes()


def again(folder, first, second, collates=(None, None), **more) -> ResumeReport:
    train(folder, first, 5, collates[0], **{n: v for n, v in more.items() if n == "num_workers"})
    return train(folder, second, 8, collates[1], **more)


def shuffled(data, size: int = 4, **more) -> DataLoader:
    return DataLoader(data, batch_size=size, shuffle=True, **more)


SAME = {
    "a data set": (Points, None),
    "a list": (lambda: [torch.ones(8)] * 16, None),
    "a collator": (Points, Scaled),
    "a loader": (lambda: shuffled(Points()), None),
    "a loader with a collator": (lambda: shuffled(Points(), collate_fn=Scaled()), None),
    "a function": (lambda: numbers(1.0), None),
    "a generator for each sample": (lambda: SeededByIndex(own=True), None),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_data_are_exact_without_a_line(name, tmp_path):
    make, collate = SAME[name]
    collates = (None, None) if collate is None else (collate(), collate())
    report = again(tmp_path, make(), make(), collates)
    assert (report.verdict, report.differences) == ("exact", ())


OTHERS = {
    "records": (Points(), Points(seed=1), "data.records"),
    "augmentation": (Points(), Points(noise=0.2), "data.values.Points.noise"),
    "length": (Points(), Points(n=80), "data.length"),
    "records of a loader": (shuffled(Points()), shuffled(Points(seed=1)), "data.records"),
    "batches of a loader": (
        shuffled(Points()),
        shuffled(Points(), size=8),
        "data.loader.batch_size",
    ),
    "the sampler of a loader": (
        shuffled(Points()),
        DataLoader(Points(), batch_size=4, sampler=SequentialSampler(range(64))),
        "data.loader.sampler",
    ),
    "the collator of a loader": (
        shuffled(Points(), collate_fn=Scaled()),
        shuffled(Points(), collate_fn=Scaled(2.0)),
        "data.collate_fn.values.scale",
    ),
    "what a function closes over": (numbers(1.0), numbers(2.0), "data.made_by.values.scale"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_of_a_loop_are_refused_by_name(name, tmp_path):
    first, second, path = OTHERS[name]
    with pytest.raises(DifferenceError) as caught:
        again(tmp_path, first, second)
    assert path in [difference.path for difference in caught.value.differences]


class Edited(Points):
    """As points, of which some are others."""

    def __init__(self, *edited: int) -> None:
        super().__init__(noise=0.0, n=16)
        self.x[list(edited)] += 1.0


def test_how_many_records_differ_is_told_and_which_is_the_first(tmp_path):
    at = sampled_records(16)
    told = rf"3 of 16 sampled records differ \(first: record {at[4]}\)"
    with pytest.raises(DifferenceError, match=told) as caught:
        again(tmp_path, Edited(), Edited(at[4], at[7], at[9]))
    assert "is the data seeded?" in str(caught.value)
    assert "['" not in str(caught.value)


def test_another_collator_of_a_loop_is_refused_by_name(tmp_path):
    with pytest.raises(DifferenceError, match=r"data\.collate_fn\.values\.scale: stored 1\.0"):
        again(tmp_path, Points(), Points(), (Scaled(), Scaled(2.0)))


@pytest.mark.parametrize("name", ["records", "length", "records of a loader"])
def test_other_data_of_a_loop_that_are_named_go_on(name, tmp_path):
    first, second, _ = OTHERS[name]
    report = again(tmp_path, first, second, policy=ResumePolicy(allow=["data"]))
    assert (report.step, report.verdict) == (5, "changed")


OF_WORKERS = {"num_workers": 2}
OWN = {
    "records": (lambda: Points(own=True), "data.repeatable"),
    "records that it seldom changes": (lambda: Seldom(own=True), "data.repeatable"),
    "records of a loader": (
        lambda: shuffled(Points(own=True), **OF_WORKERS),
        "data.repeatable",
    ),
    "batches of a loader": (
        lambda: shuffled(Points(), collate_fn=Scaled(own=True), **OF_WORKERS),
        "data.collate_fn.repeatable",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_data_of_a_loop_that_are_not_the_same_twice_are_not_covered(name, tmp_path):
    make, path = OWN[name]
    workers = {} if "loader" in name else OF_WORKERS
    report = again(tmp_path, make(), make(), **workers)
    assert report.verdict == "not covered"
    assert [difference.path for difference in report.differences] == [path]


OF_ONE_PROCESS = {
    "records": (lambda: Points(own=True), lambda: None),
    "records that it seldom changes": (lambda: Seldom(own=True), lambda: None),
    "batches": (lambda: [torch.ones(8)] * 16, lambda: Scaled(own=True)),
    "records of a loader": (lambda: shuffled(Points(own=True)), lambda: None),
    "batches of a loader": (
        lambda: shuffled(Points(), collate_fn=Scaled(own=True)),
        lambda: None,
    ),
}


@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_data_of_a_loop_go_on_with_the_generator_that_they_hold(name, tmp_path):
    make, collate = OF_ONE_PROCESS[name]
    _, whole = trained(tmp_path / "whole", make(), 9, collate())
    train(tmp_path / "run", make(), 5, collate())
    report, weights = trained(tmp_path / "run", make(), 9, collate())
    assert (report.verdict, report.differences) == ("exact", ())
    assert weights == whole


def test_what_workers_draw_of_it_is_not_covered_from_either_side(tmp_path):
    for first, second in (({}, OF_WORKERS), (OF_WORKERS, {})):
        folder = tmp_path / str(len(first))
        train(folder, Points(own=True), 5, **first)
        report = train(folder, Points(own=True), 8, **second)
        told = [(one.path, one.verdict) for one in report.differences]
        assert told == [("data.repeatable", "not covered")]


def test_a_collator_of_a_list_is_tried_too(tmp_path):
    collates = (Scaled(own=True), Scaled(own=True))
    data = [torch.ones(8)] * 16
    report = again(tmp_path, data, data, collates, **OF_WORKERS)
    assert [one.path for one in report.differences] == ["data.collate_fn.repeatable"]


def test_a_file_that_changed_is_refused_in_a_loop_too(tmp_path):
    path = tmp_path / "numbers"

    def batches():
        for number in path.read_text().split():
            yield torch.full((4, 8), float(number))

    path.write_text("0 1 2 3 4 5 6 7 8 9")
    train(tmp_path / "run", batches, 5)
    path.write_text("0 1 2 99 4 5 6 7 8 9")
    with pytest.raises(DataError, match="items 0 to 3 of epoch 0: what is read again is not"):
        train(tmp_path / "run", batches, 8)


def stateful(**options):
    kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*set_vital.*")
        return kind(Points(noise=0.0), batch_size=4, **options)


@pytest.mark.filterwarnings("ignore:.*set_vital.*")
def test_a_loader_that_is_saved_by_itself_is_covered_only_where_its_state_holds_the_order(tmp_path):
    drawn = lambda: stateful(sampler=WeightedRandomSampler(torch.ones(64), 64))  # noqa: E731
    for name, make in (("drawn", drawn), ("held", lambda: stateful(shuffle=True))):
        train(tmp_path / name, make(), 5, wrap=False)
        report = train(tmp_path / name, make(), 8, wrap=False)
        lines = [str(one) for one in report.differences]
        assert report.verdict == {"drawn": "not covered", "held": "exact"}[name]
        assert all("give it as batch_source(" in line for line in lines)
