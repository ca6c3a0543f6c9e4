"""The public face of the adapter, the versions that it fits, and its runs in other commands."""

from __future__ import annotations

import inspect

import pytest

import unbroken.adapters.transformers as adapter
from unbroken.adapters.transformers.trainer import NEWEST_TESTED, OLDEST, require_supported_version
from unbroken.cli.main import main
from unbroken.errors import ConfigError


def test_the_public_names_and_parameters_are_these():
    parameters = inspect.signature(adapter.Trainer).parameters
    own = ["resume_from_checkpoint", "allow", "skip", "exact_resume", "save_mode"]
    own += ["confirm_stops", "verify_steps"]
    assert adapter.__all__ == ["Trainer"]
    assert list(parameters) == ["arguments", *own, "options"]
    assert list(inspect.signature(adapter.Trainer.train).parameters) == [
        *("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval")
    ]


@pytest.mark.parametrize("version", ["4.57.6", "5.2.0", "6.0.0", "7.1"])
def test_a_version_whose_loop_is_not_known_is_refused_by_name(version):
    with pytest.raises(ConfigError, match=f"transformers: .*5.3.0 to 5.x.*found {version}"):
        require_supported_version(version)


@pytest.mark.parametrize("version", [OLDEST, NEWEST_TESTED, "5.99.0"])
def test_a_version_whose_loop_is_known_is_not(version):
    require_supported_version(version)


def test_other_commands_read_a_run(run, capsys):
    run(kill_at=13)
    folder = str(run.folder / "run")
    for words in (["ls", folder], ["show", folder], ["verify", folder]):
        assert main(words) == 0, words
    assert "checkpoint-10" in capsys.readouterr().out


REFUSED = {
    "save_only_model": {"save_only_model": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused_by_name(name, run):
    assert f"ConfigError: {name}" in run(args=REFUSED[name]).text


def test_another_process_in_the_same_directory_is_refused(run, server):
    from unbroken.store import RunDirectory

    with RunDirectory.open(run.folder / "run"):
        assert "LockHeldError" in run().text


OVERRIDES = ["save_model", "_save", "_save_rng_state", "_load_optimizer_and_scheduler"]


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_own_way_of_saving_is_not_left_out_silently(name, run):
    refused = run(overrides=name)
    assert f"ConfigError: OwnWay.{name}: is not called for checkpoints" in refused.text


def test_an_own_way_of_saving_may_be_left_out_by_name(run, uninterrupted):
    assert run(overrides="save_model", allow=["save_model"]).bits == uninterrupted().bits


def test_what_a_subclass_adds_to_a_checkpoint_is_there(run):
    run(overrides="_save_checkpoint", kill_at=8)
    assert (run.folder / "run/checkpoint-5/of-mine.txt").read_text() == "5"
    assert run(overrides="_save_checkpoint").first_step == 6
