"""`transformers.Trainer` with exact resume: the host's class, hooked where it saves and resumes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import transformers
from transformers.utils import logging

from unbroken.adapters.transformers.changes import UserChoices, facts_of_subclass
from unbroken.adapters.transformers.session import TrainSession
from unbroken.adapters.transformers.verified_steps import VerifiedSteps
from unbroken.capture import capture_rng, restore_rng
from unbroken.checkpoint import (
    Difference,
    ExactResume,
    ResumeFrom,
    ResumeReport,
    SaveMode,
    TrainingStopped,
)
from unbroken.checkpoint.resume.selection import DamagedCandidateError
from unbroken.data.worker_signals import is_end_of_a_worker, leave_signals_of
from unbroken.errors import ConfigError, UnbrokenError, spelled

# Which versions of transformers this adapter fits.


OLDEST = "5.3.0"
"""The first version whose training loop has the hooks that are used here."""

NEWEST_TESTED = "5.23.0"


def require_supported_version(found: str | None = None) -> None:
    """Raise unless this adapter knows the training loop of the transformers that is installed.

    Args:
        found: The version; None: of the one that is installed.

    Raises:
        ConfigError: It is older than 5.3.0, or of another major version than 5.

    Example:
        >>> require_supported_version("5.4.0")
    """
    found = _installed() if found is None else found
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    oldest = tuple(int(part) for part in OLDEST.split(".")[:2])
    if numbers[:1] != oldest[:1] or numbers < oldest:
        raise ConfigError(
            "transformers",
            "its training loop is not known to this version of unbroken",
            expected=f"{OLDEST} to 5.x (tested up to {NEWEST_TESTED})",
            found=found,
            hint="install a version that is, or use transformers' own Trainer",
        )


def _installed() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        hint = "pip install 'unbroken[transformers]'"
        raise ConfigError("transformers", "is not installed", hint=hint) from None


_log = logging.get_logger("transformers.unbroken")  # so that the host's verbosity counts

GOING_BACK = (
    "these checkpoints are unbroken's: transformers' own Trainer would take their weights alone, "
    "and train on with a fresh optimizer; `unbroken export RUN TARGET --to transformers` makes one "
    "that it resumes"
)


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose runs continue bit for bit, whenever they are killed.

    The same script, started again, goes on from the newest intact checkpoint in `output_dir`.
    What the host's class does is left as it is, but for saving and resuming: a checkpoint is
    there whole or not at all, every byte of it is checked before it is used, and nothing is
    pickled. The order of the data is the host's; what is random in samples and collators
    is keyed by (seed, epoch, sample). SIGTERM saves at the edge of the step and ends the process
    with status 75.

    Args:
        arguments: As `transformers.Trainer` takes them.
        resume_from_checkpoint: "auto": the newest intact checkpoint, or a fresh start; True,
            "latest": one must be there; False, "never"; "best"; a step; a path, also that of a
            checkpoint of the host's own Trainer. None: what `train` or `TrainingArguments` say.
        allow: Names of changes that are meant, such as "learning_rate". Who names a checkpoint
            by its path or step means the hyperparameters that he gives with it.
        skip: What of a checkpoint is not loaded: "optimizer", or patterns of parameters.
        exact_resume: "require" refuses also what is only equivalent.
        save_mode: "async": what is saved is copied, and written while training goes on, unless a
            callback's `on_save` or the hub waits for the folder; "blocking": no copy, and training
            waits; "overlap": as `Checkpointer` takes it.
        confirm_stops: Take one step more after the save for a stop, and throw it away: the next
            start repeats it and says whether it is the same.
        verify_steps: Run the forward and backward of every so manieth step twice and compare them,
            and weights and moments while they rest: a flipped bit is found and named.
        options: As `transformers.Trainer` takes them.

    Attributes:
        resume_report: What the last start found, and every difference.

    Raises:
        ConfigError: If the host is set to something that cannot be continued exactly.
    """

    def __init__(
        self,
        *arguments: Any,
        resume_from_checkpoint: ResumeFrom = None,
        allow: Sequence[str] = (),
        skip: Sequence[str] = (),
        exact_resume: ExactResume = "prefer",
        save_mode: SaveMode = "async",
        confirm_stops: bool = False,
        verify_steps: int | None = None,
        **options: Any,
    ) -> None:
        require_supported_version()
        self.resume_report = ResumeReport(step=0)
        self._session: TrainSession | None = None
        self._verified: VerifiedSteps | None = None
        args: Any = options.get("args", arguments[1] if len(arguments) > 1 else None)
        by_signal = getattr(args, "enable_jit_checkpoint", False)
        if by_signal:
            args.enable_jit_checkpoint = False  # signals are handled here, at the edge of steps
        super().__init__(*arguments, **options)
        if by_signal:
            args.enable_jit_checkpoint = True
        self.resume_choices = UserChoices(
            resume_from_checkpoint,
            tuple(allow),
            tuple(skip),
            exact_resume,
            save_mode,
            confirm_stops,
            verify_steps,
            has_optimizer=self.optimizer is not None,
            has_scheduler=self.lr_scheduler is not None,
        )

    def train(
        self,
        resume_from_checkpoint: ResumeFrom = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train from the newest intact checkpoint, or from the start, to the end of the run.

        Args:
            resume_from_checkpoint: As the class takes it; None: what that, or else
                `TrainingArguments.resume_from_checkpoint`, says; in the end "auto".
            trial: Of a hyperparameter search, which saves as the host does.
            ignore_keys_for_eval: As the host takes it.

        Returns:
            What the host returns; over all starts of the run.

        Raises:
            TrainingStopped: After a save, if a signal asked for a stop; left alone, it ends the
                process with exit status 75.
            DifferenceError: If the training changed and the change is not named.
            CheckpointError: If the checkpoint asked for cannot be used.
            SaveError: If a checkpoint could not be saved; earlier ones are as they were.
        """
        if trial is not None:
            return super().train(None, trial, ignore_keys_for_eval)
        choices = self.resume_choices
        refuse_what_cannot_resume(self, choices.allow)
        given = (resume_from_checkpoint, choices.resume_from_checkpoint)
        requested = next(
            (one for one in given if one is not None), self.args.resume_from_checkpoint
        )
        with (
            telling_of_an_early_stop(),
            naming_what_exists_here(),
            TrainSession(
                self,
                choices,
                _as_path(requested),
                lambda: self._subclass_facts,
                tell=_log.warning,
            ) as session,
        ):
            self._verified = VerifiedSteps.of(self, session, choices.verify_steps, self._tell)
            self._session = session
            self.add_callback(session.position_callback)
            skips, self.args.ignore_data_skip = self.args.ignore_data_skip, False  # known by now
            try:
                folder = None if session.folder is None else str(session.folder)
                return super().train(folder, None, ignore_keys_for_eval)
            finally:
                self.args.ignore_data_skip = skips
                self._session = None
                self.remove_callback(session.position_callback)
                if self._verified is not None:
                    self._verified.end()
                    self._verified = None

    def _tell(self, line: str) -> None:
        if self.is_world_process_zero():
            _log.warning(line)

    @cached_property
    def _subclass_facts(self) -> dict[str, Any]:
        """What a user's subclass is at the first start: what training made of it is no setting."""
        return facts_of_subclass(self)

    # Hooks of the host's loop, in the order in which it calls them.

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; once more from an older checkpoint where damage was found in the one loaded."""
        run, rest = self._session, (trial, ignore_keys_for_eval)
        if run is None or run.folder is None:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, *rest)
        before = capture_rng()  # the host may draw before the checkpoint brings its own back
        while True:
            try:
                return super()._inner_training_loop(batch_size, args, str(run.folder), *rest)
            except DamagedCandidateError as damaged:
                batch_size = run.begin_again(damaged.older) or batch_size
                restore_rng(before)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._session is None:  # else the weights come with everything else
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Return the host's loop counts, adjusted to the position of the run.

        Whatever `get_train_dataloader` has returned, of the host or of a subclass, is from here on
        a loader whose batches continue exactly at any position.
        """
        if self._session is None:
            return super().set_initial_training_values(args, dataloader)
        loader = self._session.loader(dataloader)
        return self._session.adjusted_counts(super().set_initial_training_values(args, loader))

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        folder = resume_from_checkpoint if self._session is None else None
        counts = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        begin: tuple[int, int] = super()._init_training_state(*counts, folder, trial)
        return begin if self._session is None else self._session.state_from_checkpoint()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        session = self._session
        if session is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        prepared = super()._prepare_for_training(max_steps, session.continued_loader, None)
        session.resume()
        self.resume_report = session.report
        session.checkpointer.confirmation.on_found = self._note_found
        if self.is_world_process_zero():
            _log_report(self.resume_report)
            step = self.state.global_step
            if self.resume_report.resumed and (session.is_stopped or step >= max_steps):
                by = "" if step >= max_steps else " (a callback ended the run)"
                _log.warning(f"finished at step {step} of {max_steps} already{by}; nothing to do")
        return prepared

    def _note_found(self, line: str, difference: Difference | None) -> None:
        self.resume_report = self.resume_report.with_found(line, difference)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        if self._session is not None:
            self._session.epoch_begins(options["epoch"])
        super()._run_epoch(*arguments, **options)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._session is None:
            super()._load_rng_state(checkpoint)
        else:
            self._session.restore_random_states()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Fetch the batches of a step; fewer where the run went on inside of a window."""
        if self._session is not None:
            num_batches = self._session.first_batches(num_batches)
        try:
            samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        except RuntimeError as error:
            self._stop_without_workers(error)
            raise
        if self._session is not None:
            self._session.preemption.training_begins()
            for batch in samples[0]:
                self._session.checkpointer.confirmation.observer.note_batch(batch)
        return samples

    def _stop_without_workers(self, error: RuntimeError) -> None:
        """Save and stop, if what asks for a stop has killed workers that were still starting."""
        session = self._session
        reason = None if session is None else session.preemption.reason()
        if reason is not None and self.args.world_size == 1 and is_end_of_a_worker(error):
            self._stop(reason, may_confirm=False)

    def _stop(self, reason: str, *, may_confirm: bool = True) -> None:
        """Save, unless this step is saved, and raise what ends the process, perhaps a step on."""
        session, step = self._session, self.state.global_step
        if session is not None and session.saved_step != step:
            self._compare_before_save()
            session.save()
        if session is not None:
            session.checkpointer.confirmation.stopped()
        stopped = TrainingStopped(step, reason)
        if self.is_world_process_zero():
            _log.warning(str(stopped))
        if session is None or not may_confirm or not self.resume_choices.confirm_stops:
            raise stopped
        session.checkpointer.wait()
        session.stopping = stopped

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler and self._session is not None and self._session.report.resumed:
            return {}  # the evaluation at the start of the run has been
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluation_loop(self, dataloader: Any, *arguments: Any, **options: Any) -> Any:
        """Evaluate as the host does; a signal to all processes ends no worker in the middle."""
        if self._session is not None:
            leave_signals_of(dataloader)
        return super().evaluation_loop(dataloader, *arguments, **options)

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        session = self._session
        if session is None:
            super()._maybe_log_save_evaluate(*arguments, **options)
            return
        if session.stopping is not None:
            raise session.stopping  # the step after the save has left its record
        reason = session.end_of_step()
        if reason is not None:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*arguments, **options)
        if reason is not None:
            self._stop(reason)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._session is None:
            super()._save_checkpoint(model, trial)
            return
        self._compare_before_save()
        folder = self._session.save()
        if self.args.push_to_hub or looks_at_saves(self.callback_handler.callbacks):
            self._session.checkpointer.wait()
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)

    def _compare_before_save(self) -> None:
        if self._verified is not None:
            self._verified.verifier.compare_resting(self.state.global_step)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log as the host does, and into metrics.jsonl, where each line is exactly once."""
        if self._verified is not None and self._verified.verifier.is_repeating:
            return  # it was logged when this pass was first run
        super().log(logs, *arguments, **options)
        if self._session is not None:
            self._session.note(logs)

    def _load_best_model(self) -> None:
        if self._session is None:
            super()._load_best_model()
        else:
            self._session.load_best()

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        session = self._session
        if session is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        session.restore_after_host_reset()
        session.checkpointer.wait()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # it deletes nothing
        try:
            begin = start_time - session.seconds_before
            result = super()._finalize_training(trial, num_train_samples, begin)
        finally:
            self.args.save_total_limit = limit
        if self.is_world_process_zero():
            _log.warning(GOING_BACK)
        return result


def fsdp_version(host: transformers.Trainer) -> int | None:
    """Return which FSDP accelerate shards the model by; None: by none."""
    if not host.is_fsdp_enabled:
        return None
    return int(getattr(host.accelerator.state.fsdp_plugin, "fsdp_version", 1))


def refuse_what_cannot_resume(host: transformers.Trainer, allow: Collection[str] = ()) -> None:
    """Raise where the host is set to something that this adapter does not bring back exactly.

    Args:
        host: The trainer.
        allow: Names of methods that a subclass may have in its own way.

    Raises:
        ConfigError: Naming the setting.
    """
    args = host.args
    if host.is_deepspeed_enabled:
        hint = "use FSDP2 or DDP, or transformers' own Trainer"
        raise ConfigError("deepspeed", "keeps the optimizer where no other sees it", hint=hint)
    version = fsdp_version(host)
    if version == 1:
        what = "FSDP1 keeps parameters in flat ones without names, and PyTorch gives it up"
        hint = 'fsdp_config={"version": 2, ...}'
        raise ConfigError("fsdp_config", what, expected="version 2", found="version 1", hint=hint)
    refuse_overrides(type(host), allow)
    if args.save_only_model:
        hint = "take it out, or use transformers' own Trainer"
        raise ConfigError("save_only_model", "leaves nothing to resume from", hint=hint)


_NOT_CALLED = (
    *("save_model", "_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"),
    *("_load_optimizer_and_scheduler", "_load_scaler"),
)
"""What the host calls for its checkpoints, and a subclass may have in its own way."""


def refuse_overrides(kind: type, allow: Collection[str]) -> None:
    """Raise where a subclass overrides saving or loading, unless `allow` names it.

    Raises:
        ConfigError: Naming the method.
    """
    for name in _NOT_CALLED:
        own = getattr(kind, name)
        if own is not getattr(transformers.Trainer, name) and name not in allow:
            what = "is not called for checkpoints: what it writes or reads would be missing"
            hint = (
                f"allow=[{name!r}] leaves it out of checkpoints, where all is saved without it; "
                "overriding _save_checkpoint adds to them"
            )
            raise ConfigError(own.__qualname__, what, hint=hint)


def looks_at_saves(callbacks: Iterable[Any]) -> bool:
    """Return whether a callback overrides `on_save`."""
    plain = transformers.TrainerCallback.on_save
    return any(type(one).on_save is not plain for one in callbacks)


def _as_path(requested: Any) -> Any:
    """Expand a path that begins with "~"."""
    return os.path.expanduser(requested) if isinstance(requested, str) else requested


@contextmanager
def telling_of_an_early_stop() -> Iterator[None]:
    """Log a warning where a signal ends a start before its first step."""
    try:
        yield
    except TrainingStopped as stopped:
        if stopped.step is None:
            _log.warning(str(stopped))
        raise


@contextmanager
def naming_what_exists_here() -> Iterator[None]:
    """Let hints of errors name no setting that this Trainer does not take."""
    try:
        yield
    except UnbrokenError as error:
        error.respell(partial(spelled, place="host"))
        raise


def _log_report(report: ResumeReport) -> None:
    for line in report.lines():
        _log.warning(line)
