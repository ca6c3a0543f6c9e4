"""The command `unbroken`: its arguments, what to do, and errors turned into exit statuses.

Nothing heavy is imported before it is known to be needed: `ls`, `show`, `verify`, `diff` and
`--help` load neither torch nor numpy.
"""

from __future__ import annotations

import gc
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from tyro.conf import Positional, Suppress, UseAppendAction, arg

from unbroken.errors import ConfigError, UnbrokenError, printable, spelled

# The arguments of each command; tyro reads these classes.


Json = Annotated[bool, arg(name="json")]


@dataclass(frozen=True)
class LsCommand:
    """List runs, or the checkpoints of a run.

    Only manifests and file sizes are looked at; `unbroken verify` reads every byte.
    """

    runs: Positional[tuple[str, ...]] = ()
    """Run directories, or folders that hold some. None: ./runs and the current directory."""
    as_json: Json = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print the lists; return the exit status."""
        from unbroken.cli.ls import print_listing

        return print_listing(self.runs, as_json=self.as_json)


@dataclass(frozen=True)
class ShowCommand:
    """Show what a run or one checkpoint is: progress, configuration, environment, files."""

    path: Positional[str]
    """A run directory, or a checkpoint folder in one."""
    history: bool = False
    """Show the history of the run: each start, what it found, and each stop."""
    as_json: Json = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print what it is; return the exit status."""
        from unbroken.cli.show import print_run

        return print_run(self.path, with_history=self.history, as_json=self.as_json)


@dataclass(frozen=True)
class VerifyCommand:
    """Read every byte of the checkpoints and list all damage; exit status 10 if there is any."""

    path: Positional[str]
    """A run directory, or a checkpoint folder in one."""
    step: int | None = None
    """Only the checkpoint of this step."""
    as_json: Json = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Print what was found; return the exit status."""
        from unbroken.cli.verify import print_results

        return print_results(self.path, step=self.step, as_json=self.as_json)


@dataclass(frozen=True)
class DiffCommand:
    """Tell what differs between checkpoints, runs and configuration files.

    Configuration, environment, data, every value of the state, and all tensors; by their digests,
    without reading a tensor. Exit status 0: the same; 1: different; 2: trouble.
    """

    a: Annotated[Positional[str], arg(metavar="A")]
    """A checkpoint folder, a run directory (its newest checkpoint), or a .yaml, .yml or .json file
    with settings."""
    b: Annotated[Positional[str], arg(metavar="B")]
    """Another one. Of a checkpoint and a file, the settings that the file names are compared."""
    values: bool = False
    """Read the tensors that differ: how far apart they are (absolute, relative, ULP), and where."""
    show_all: Annotated[bool, arg(name="all")] = False
    """Show every row of long tables, and what is the same."""
    as_json: Json = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print the differences; return the exit status."""
        from unbroken.cli.diff import print_diff

        return print_diff(
            self.a,
            self.b,
            with_values=self.values,
            show_all=self.show_all,
            as_json=self.as_json,
        )


@dataclass(frozen=True)
class ExportCommand:
    """Write what a checkpoint holds for other programs: whole weights, or another trainer's layout.

    Weights that several ranks saved in shards are put together, without a process group and in
    little memory; every byte is verified.
    """

    path: Positional[str]
    """A checkpoint folder, or a run directory (its newest checkpoint)."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """A folder that is not there yet; a Hugging Face Trainer wants it to be called
    checkpoint-<step>."""
    to: Literal["weights", "transformers"] = "weights"
    """"weights": what `from_pretrained` reads; "transformers": what the Hugging Face Trainer goes
    on from, of a run of `unbroken.adapters.transformers`."""
    model: str = "model"
    """The name of the model, where the checkpoint holds several. Weights alone."""
    max_file_size: str = "50GB"
    """Above this, the weights go into several files with an index. Weights alone."""

    def run(self) -> int:
        """Write the files; return the exit status."""
        from unbroken.cli.export import print_export, print_export_to_transformers

        if self.to == "transformers":
            return print_export_to_transformers(self.path, self.out)
        return print_export(self.path, self.out, model=self.model, max_file_size=self.max_file_size)


@dataclass(frozen=True)
class CheckCommand:
    """Prove whether any training script resumes exactly.

    unbroken check [options] -- python train.py ARGS. The script runs twice without a kill, and
    once with SIGKILLs, each followed by the resume command. Every optimizer step is compared:
    data, loss, learning rate, gradients, weights, buffers, optimizer state, random generators.
    The script is not changed. Exit status: 0 exact, 1 not exact, 2 could not tell.
    """

    steps: int | None = None
    """End each run after so many optimizer steps; None: let the script come to its end."""
    kills: int = 2
    """How many kills, at random steps."""
    at: str | None = None
    """The steps after which to kill, instead of random ones: 7 or 7,12."""
    seed: int = 0
    """Where the random steps come from."""
    resume_command: str | None = None
    """The command that continues a killed run; None: the same command."""
    clean: UseAppendAction[tuple[str, ...]] = ()
    """What the script leaves in the current folder, to be removed before each run."""
    timeout: float = 3600.0
    """Seconds after which a start of the script is given up."""
    digests: Literal["auto", "full", "sampled"] = "auto"
    """Compare every byte, or blocks of large tensors; auto: blocks from 1 GiB of parameters on."""
    keep: str | None = None
    """Keep recordings and outputs in this new folder."""
    as_json: Json = False
    """Print JSON instead of text."""
    command: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Print the verdict; return the exit status."""
        from unbroken.check import CheckRequest
        from unbroken.cli.check import print_check

        again = None if self.resume_command is None else tuple(shlex.split(self.resume_command))
        request = CheckRequest(
            command=self.command,
            resume_command=again,
            steps=self.steps,
            at=_steps(self.at),
            kills=self.kills,
            seed=self.seed,
            clean=self.clean,
            timeout=self.timeout,
            digests=self.digests,
            keep=None if self.keep is None else Path(self.keep),
        )
        return print_check(request, as_json=self.as_json)


@dataclass(frozen=True)
class DemoCommand:
    """Kill a training run again and again, and show that it equals one that was not killed.

    A small GPT-2 is trained twice on real text by `unbroken train`, in processes of their own:
    once in peace, once under SIGKILLs at random moments, one of them inside a save. Then every
    tensor, the loss of every step and the order of the data are compared, byte by byte. Exit
    status 0 only if all are the same.
    """

    keep: str | None = None
    """Keep the runs in this folder; None: a temporary folder, removed at the end."""
    steps: int = 60
    """Optimizer steps of each run."""
    kills: int = 4
    """How often the second run is killed."""
    seed: int | None = None
    """Repeat the moments of an earlier demo; None: new random ones, whose seed is printed."""

    def run(self) -> int:
        """Run it and report; return the exit status."""
        from unbroken.cli.demo import run_demo

        if self.steps < MIN_DEMO_STEPS:
            raise ConfigError("--steps", expected=f"at least {MIN_DEMO_STEPS}", found=self.steps)
        if self.kills < 1:
            raise ConfigError("--kills", expected="at least 1", found=self.kills)
        return run_demo(keep=self.keep, steps=self.steps, kills=self.kills, seed=self.seed)


@dataclass(frozen=True)
class DoctorCommand:
    """Tell what this machine is, and what on it would break bit-exactness, with the remedy.

    Versions, switches, environment variables, the file system of a run directory; and a small
    training is done twice, to see whether it gives the same bits. Exit status 0: nothing would
    break bit-exactness; 1: something would.
    """

    path: Annotated[Positional[str | None], arg(metavar="[RUN]")] = None
    """A run directory, there or not yet: its file system is tried out."""
    thorough: bool = False
    """Also do the small training in two fresh processes."""
    as_json: Json = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print what was seen; return the exit status."""
        from unbroken.cli.doctor import print_diagnosis

        return print_diagnosis(self.path, thorough=self.thorough, as_json=self.as_json)


@dataclass(frozen=True)
class PlanCommand:
    """Tell how often a cluster that is not here should save, and what failures will cost it.

    The interval that loses least time, the useful part of the time (goodput), the storage needed;
    by a formula, and by a simulation of failures that must agree with it.
    """

    gpus: int
    """How many GPUs train together."""
    parameters: str
    """Of the model: 124M, 8B, 405B."""
    bandwidth: str
    """What the storage takes from all GPUs together: 2GB/s, 2TB/s."""
    optimizer: Literal["adamw", "adamw-bf16", "adamw-8bit", "lion", "momentum", "sgd"] = "adamw"
    """Which moments are saved: 8, 4, 2, 4, 4 and 0 bytes for each parameter."""
    parameter_bytes: int = 4
    """Of one parameter as it is saved."""
    gpu_days: float | None = None
    """Mean days between failures of one GPU and all around it; None: those of Llama 3's 16,384
    GPUs, 419 unexpected interruptions in 54 days."""
    lost_seconds: float | None = None
    """Training that one save costs, where saving overlaps with training; None: it blocks."""
    starting_seconds: float = 300.0
    """From a failure until the checkpoint is read."""
    step_seconds: float | None = None
    """Of one training step, to give the interval in steps too."""
    keep: int = 3
    """How many checkpoints are kept."""
    as_json: Json = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Print the plan; return the exit status."""
        from unbroken.cli.plan import number_of, print_plan
        from unbroken.goodput import PUBLISHED_FAILURES
        from unbroken.planner import Cluster, make_plan

        gpu_days = PUBLISHED_FAILURES.gpu_days if self.gpu_days is None else self.gpu_days
        cluster = Cluster(
            self.gpus,
            number_of(self.parameters, "--parameters"),
            number_of(self.bandwidth, "--bandwidth"),
            self.optimizer,
            self.parameter_bytes,
            gpu_days,
            self.lost_seconds,
            self.starting_seconds,
        )
        plan = make_plan(cluster, kept=self.keep, step_seconds=self.step_seconds)
        return print_plan(plan, as_json=self.as_json)


@dataclass(frozen=True)
class TrainCommand:
    """Train a causal language model on text files, as a YAML file says.

    The same command continues a run that was stopped or killed.
    """

    config: Positional[str]
    """YAML file; `unbroken train --help` lists all settings."""


MIN_DEMO_STEPS = 12
COMMANDS = {
    "train": TrainCommand,
    "demo": DemoCommand,
    "check": CheckCommand,
    "ls": LsCommand,
    "show": ShowCommand,
    "verify": VerifyCommand,
    "diff": DiffCommand,
    "export": ExportCommand,
    "doctor": DoctorCommand,
    "plan": PlanCommand,
}


def _steps(text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(step) for step in text.split(","))
    except ValueError:
        raise ConfigError("--at", expected="steps such as 7 or 7,12", found=text) from None


# From the words of a command line to the command.


Command = (
    CheckCommand
    | DemoCommand
    | DiffCommand
    | DoctorCommand
    | LsCommand
    | PlanCommand
    | ShowCommand
    | VerifyCommand
)
_DESCRIPTION = (
    "A PyTorch training run that is killed at any moment and started again is the same run, "
    "bit for bit."
)


def parse_command(given: Sequence[str]) -> Command:
    """Return the command that the words ask for.

    Raises:
        SystemExit: With status 0 after `--help`, with 2 if the words ask for nothing known.

    Example:
        >>> parse_command(["verify", "runs/gpt2", "--step", "10"]).step
        10
    """
    classes = cast("dict[str, Any]", COMMANDS)
    own, command = _before_and_after_dashes(given)
    found = cast(
        "Command",
        tyro.extras.subcommand_cli_from_dict(
            classes, prog="unbroken", description=_DESCRIPTION, args=own
        ),
    )
    return replace(found, command=tuple(command)) if isinstance(found, CheckCommand) else found


def _before_and_after_dashes(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own words, and those of the command that `check` is to run."""
    words = list(given)
    if words[:1] != ["check"] or "--" not in words:
        return words, []
    dashes = words.index("--")
    return words[:dashes], words[dashes + 1 :]


# From the process to the command, and from its errors to exit statuses.


_FAILED = 1
_TROUBLE_OF_DIFF = 2  # as of diff(1), whose 1 says that the two differ
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one sentence, no traceback.

    The status is 0 if all is well, 2 for a wrong command line or configuration, 75 for a
    training that was asked to stop and saved, 130 after Ctrl-C, and else the `exit_code` of
    the error's class in `unbroken.errors`. Of `diff` it is 0, 1 if the two differ, else 2.

    Args:
        arguments: The words after `unbroken`; None: those of this process.

    Raises:
        SystemExit: For `--help`, for a wrong command line, and when a training was stopped.

    Example:
        >>> main(["ls", "no-such-folder"])
        5
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _write_what_cannot_be_encoded_as_escapes()
    try:
        status = _run(given)
        sys.stdout.flush()
    except UnbrokenError as error:
        _print_error(error)
        return _failure(given, error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:  # what the disk says: no permission, no room
        sys.stderr.write(printable(f"{type(error).__name__}: {error}\n"))
        return _failure(given, _FAILED)
    return status


def _run(given: list[str]) -> int:
    if given[:1] == ["train"]:
        return _train()(given[1:])
    if given == ["--version"]:
        from unbroken import __version__

        sys.stdout.write(f"unbroken {__version__}\n")
        return 0
    return parse_command(given).run()


def _train() -> Callable[[Sequence[str]], int]:
    """Import PyTorch; the garbage collector would look at all of it again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        from unbroken.language_model.train import train
    finally:
        if was_on:
            gc.enable()
    return train


def _failure(given: Sequence[str], status: int) -> int:
    return _TROUBLE_OF_DIFF if given[:1] == ["diff"] else status


def _print_error(error: UnbrokenError) -> None:
    error.respell(partial(spelled, place="command"))
    lines = [f"{type(error).__name__}: {error}"]
    if error.hint is not None:
        lines += [f"  {line}" for line in error.hint.split("\n")]
    sys.stderr.write(printable("\n".join(lines)) + "\n")


def _write_what_cannot_be_encoded_as_escapes() -> None:
    """Let a terminal or a pipe that is not UTF-8 have a name all the same."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
