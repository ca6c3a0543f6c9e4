"""The public face is a decision: a name or a parameter that comes or goes changes this file."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.resources import files

import pytest

import unbroken
from unbroken.testing import assert_loader_resumes_at_every_step, assert_resumes_exactly

NAMES = [
    "Callback",
    "CaptureError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "ConfigError",
    "CorruptCheckpointError",
    "DataError",
    "Difference",
    "DifferenceError",
    "EXIT_STOPPED",
    "KeepEvery",
    "KeepPolicy",
    "LockHeldError",
    "NewerFormatError",
    "OutOfMemoryError",
    "Progress",
    "RankError",
    "RankPolicy",
    "RankTimeoutError",
    "ResumePolicy",
    "ResumeReport",
    "RunDirectoryError",
    "RunFacts",
    "SaveError",
    "SavePolicy",
    "StateMismatchError",
    "StepVerificationError",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "TrainingStopped",
    "UnbrokenError",
    "__version__",
    "batch_source",
]

PARAMETERS = {
    unbroken.Trainer: "model config train_dataset eval_dataset callbacks optimizer scheduler "
    "processing_class collate_fn loss_fn state settings types storage display group clock "
    "wall_clock",
    unbroken.Trainer.train: "self resume_from_checkpoint",
    unbroken.Trainer.evaluate: "self",
    unbroken.Trainer.save_checkpoint: "self",
    unbroken.Trainer.load_checkpoint: "self which",
    unbroken.Trainer.stop: "self reason",
    unbroken.Checkpointer: "directory branch save_steps save keep resume ranks "
    "settings types clock tell objects",
    unbroken.Checkpointer.resume: "self which ahead",
    unbroken.Checkpointer.import_state: "self step values facts source",
    unbroken.Checkpointer.load: "self step names",
    unbroken.Checkpointer.save: "self step values facts",
    unbroken.Checkpointer.save_if_due: "self step values",
    unbroken.Checkpointer.should_save: "self step",
    unbroken.Checkpointer.wait: "self",
    unbroken.Checkpointer.poll: "self",
    unbroken.Checkpointer.log: "self record values",
    unbroken.Checkpointer.steps: "self until batch_size accumulate resume",
    unbroken.Checkpointer.epochs: "self until batch_size accumulate resume",
    unbroken.Checkpointer.batches: "self",
    unbroken.Checkpointer.stop: "self",
    unbroken.Checkpointer.close: "self",
    assert_resumes_exactly: "command arguments resume_command at kills steps seed timeout folder "
    "clean",
    assert_loader_resumes_at_every_step: "make_loader steps",
}


def test_the_public_names_are_these():
    assert sorted(unbroken.__all__) == sorted(NAMES)
    assert dir(unbroken) == unbroken.__all__


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(unbroken, name)
    assert value.__doc__


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda function: function.__qualname__)
def test_the_public_parameters_are_these(function):
    assert list(inspect.signature(function).parameters) == PARAMETERS[function].split()


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = unbroken.Trainr


def test_importing_the_package_imports_neither_torch_nor_numpy():
    code = "import sys, unbroken; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_package_tells_type_checkers_that_it_is_typed():
    assert files("unbroken").joinpath("py.typed").is_file()
