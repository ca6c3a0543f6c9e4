"""What this start is, held against what a checkpoint was made with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from unbroken.capture import (
    ParameterNames,
    Skip,
    how_cut,
    keep_skipped,
    named_objects,
    structure_digest,
)
from unbroken.changes.apply import (
    NOT_LOADED,
    InitialHyperparameters,
    take_effect,
    untrained_names,
)
from unbroken.changes.differences import (
    Difference,
    ExactResume,
    Rule,
    by_severity,
    compare,
    is_named,
    refuse_unnamed,
    unchanged,
)
from unbroken.changes.rules import (
    CODE_RULES,
    ENVIRONMENT_RULES,
    GPU,
    LENGTH,
    LENGTH_SETTINGS,
    MACHINE,
    SCRIPT_RENAMED,
    fingerprint_differences,
    flat,
    rule_of,
    uncovered_facts,
)
from unbroken.data import LoaderSource, MapSource
from unbroken.fingerprint import (
    MAX_REACHED,
    MODULES,
    Plain,
    begin_source_facts,
    cut_off,
    model_facts,
    optimizer_facts,
    plain_or_text,
    scheduler_facts,
)
from unbroken.fingerprint.environment import (
    GPU_DETAILS,
    GPU_SOFTWARE,
    code_facts,
    environment_facts,
)
from unbroken.stored_names import stored_class_name

# How the machine and the software of a checkpoint differ from those of this start.


def environment_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any] | None = None
) -> tuple[Difference, ...]:
    """Return how machine and software differ, the most severe difference first.

    Every difference that can change a bit is "equivalent", none is "changed": training goes on
    with the same data and settings, and rounds differently. "harmless" are only facts that no
    number depends on.

    No difference is: a path that one side does not have (it came or went with a version of
    unbroken, or is of a package that a program imports sooner or later), and what one side does
    not know (GPUs before CUDA was used). A variable that was set or unset is one.

    Args:
        stored: `environment_facts()` of the checkpoint.
        now: Those of this start; None: of this process.

    Returns:
        Differences whose paths begin with "environment.".

    Example:
        >>> stored, now = {"num_threads": 8, "cores": 8}, {"num_threads": 4, "cores": 4}
        >>> found = environment_differences(stored, now)
        >>> [(difference.path, difference.verdict) for difference in found]
        [('environment.num_threads', 'equivalent'), ('environment.cores', 'harmless')]
        >>> found[0].effect
        'another number of threads sums in another order'
    """
    facts: Mapping[str, Any] = environment_facts() if now is None else now
    left_out = _implied_by_gpus(stored.get("gpus"), facts.get("gpus"))
    after = {path: value for path, value in facts.items() if path not in left_out}
    rules = {**dict.fromkeys(after, MACHINE), **ENVIRONMENT_RULES}
    found = [_in_plain_words(difference) for difference in compare(stored, after, rules)]
    return tuple(replace(difference, path=f"environment.{difference.path}") for difference in found)


def _implied_by_gpus(stored: Sequence[str] | None, now: Sequence[str] | None) -> Collection[str]:
    """Return the paths to leave out: one line on the GPUs says all that follows from them."""
    if stored is None or now is None:
        return GPU_DETAILS
    if stored == now:
        return ()
    without_names = GPU_DETAILS[1:]
    return without_names if stored and now else (*without_names, *GPU_SOFTWARE)


def _in_plain_words(difference: Difference) -> Difference:
    if difference.path != "gpus" or not all(map(_is_names, (difference.stored, difference.now))):
        return difference
    before, after = Counter(difference.stored), Counter(difference.now)
    return replace(
        difference, stored=_counted(before), now=_counted(after), effect=_gpu_effect(before, after)
    )


def _is_names(gpus: object) -> bool:
    return isinstance(gpus, list | tuple) and all(isinstance(name, str) for name in gpus)


def _counted(gpus: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none"


def _gpu_effect(before: Counter[str], after: Counter[str]) -> str:
    if not before or not after:
        return "what ran on a GPU and runs on the CPU now, or the reverse, rounds differently"
    if before.keys() != after.keys():
        return GPU[1]
    if before == after:
        return "the same GPUs in another order: each process may have another one"
    return "the same GPU, but another number of them: sums over GPUs run in another order"


# How the code that this start runs differs from that of a checkpoint.


def code_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any] | None = None
) -> tuple[Difference, ...]:
    """Return how the code of a start differs from that of a checkpoint, judged by files.

    All that differs is "equivalent": a change may be a comment, or the loss. `git_dirty` is no
    exception: at one commit it can only change when tracked files did. (That files are dirty at
    both starts says nothing about whether they are the same; only the script is compared.) A
    script that was renamed, and has the same bytes, is "harmless". What one side does not know
    is no difference, nor is a module that only one of them has loaded.

    Args:
        stored: `code_facts()` of the checkpoint.
        now: Those of this start; None: of this process.

    Returns:
        Differences whose paths begin with "code.".

    Example:
        >>> stored = {"script": "train.py", "script_digest": "5a", "git_dirty": None}
        >>> now = {"script": "train.py", "script_digest": "c3", "git_dirty": True}
        >>> for difference in code_differences(stored, now):
        ...     print(difference.path, difference.verdict)
        code.script_digest equivalent
    """
    facts: Mapping[str, Any] = code_facts() if now is None else now
    before, after = _known(stored), _known(facts)
    rules = dict(CODE_RULES)
    digest = before.get("code.script_digest")
    if digest is not None and digest == after.get("code.script_digest"):
        rules["code.script"] = SCRIPT_RENAMED
    after.pop("code.modules", None)
    modules = _of_modules(_group(stored, "modules"), _group(facts, "modules"))
    return by_severity((*compare(before, after, rules), *modules))


def _of_modules(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return one difference for all modules that are not the same files."""
    names = [name for name, digest in after.items() if before.get(name, digest) != digest]
    if not names:
        return ()
    path = f"code.modules.{names[0]}" if len(names) == 1 else "code.modules"
    verdict, effect = CODE_RULES["code.modules"]
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    text = f"{', '.join(names[:_MANY])}{more}: {effect}"
    sides = (before[names[0]], after[names[0]])
    if len(names) > 1:
        sides = (f"{len(names)} modules", "other files")
    return (Difference(path, *sides, text, verdict),)


_MANY = 5


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"code.{name}": value for name, value in facts.items() if value is not None}


FINGERPRINT_VERSION = 1
"""Raised whenever the same thing would get other facts than before."""

DifferenceFilter = Callable[[Mapping[str, Any], tuple[Difference, ...]], tuple[Difference, ...]]
"""From the facts of a checkpoint and the differences found so far to all that matter, and what is
the same of what it compares itself."""


_MADE_BY_SETTINGS = {"fp16": "scaler", "lr_scheduler_type": "scheduler", "optim": "optimizer"}


@dataclass(frozen=True)
class ResumePolicy:
    """Which differences a start accepts.

    Args:
        allow: Names of changes that are meant; the name of a group names all in it.
        skip: What is not loaded, as `Skip` takes it.
        exact_resume: "require" refuses what is only equivalent.
        parts: Objects that a setting makes: {"fp16": "scaler"}. One that came, went or got
            another class with a named setting is not loaded.

    Example:
        >>> ResumePolicy(allow=("learning_rate",)).exact_resume
        'prefer'
    """

    allow: Sequence[str] = ()
    skip: Sequence[str] = ()
    exact_resume: ExactResume = "prefer"
    parts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_trainer(
        cls,
        allow: Sequence[str],
        skip: Sequence[str],
        exact_resume: ExactResume,
        *,
        follows: Sequence[str] = (LENGTH,),
    ) -> ResumePolicy:
        """Return the policy of a trainer whose settings make its optimizer and schedule.

        Args:
            allow: Names of changes that are meant.
            skip: What is not loaded.
            exact_resume: "require" refuses what is only equivalent, and what `follows` names.
            follows: Changes that need no name, as they follow from others that do.
        """
        implied = () if exact_resume == "require" else follows
        lengths = LENGTH_SETTINGS if LENGTH in allow else ()
        return cls((*allow, *implied, *lengths), skip, exact_resume, _MADE_BY_SETTINGS)

    @property
    def named(self) -> set[str]:
        """All names that the caller gave: what is not loaded may be anything."""
        return {*self.allow, *self.not_loaded}

    @property
    def not_loaded(self) -> set[str]:
        """The names of what is not loaded, and of the settings that make it."""
        made = {setting for setting, part in self.parts.items() if part in self.skip}
        return {*self.skip, *made}


class Comparison:
    """The facts of this start, taken before a resume changes anything, and the differences.

    Args:
        objects: The registered objects, by name.
        settings: Settings in groups, as plain values.
        more: Returns more groups of facts: {"data": ...}; called once, before a resume. A group
            may be a function that waits for them: it is called when they are needed. Without a
            group "data" that of the sources of batches among the objects is taken; None: no facts.
        policy: Which differences are accepted.
        examine: May add differences or take some away.
        made_by_settings: Names of objects whose hyperparameters are settings, and so are
            compared with these.
        check_values: Raises where the values of a checkpoint are none of such a run.
    """

    def __init__(
        self,
        objects: Mapping[str, object],
        *,
        settings: Mapping[str, Any] | None = None,
        more: Callable[[], Mapping[str, Any]] | None = None,
        policy: ResumePolicy | None = None,
        examine: DifferenceFilter | None = None,
        made_by_settings: Collection[str] = (),
        check_values: Callable[[Any], None] | None = None,
    ) -> None:
        self._made_by_settings = set(made_by_settings)
        self._check_values = check_values
        self._objects = objects
        self._settings = _plain_settings(settings or {})
        self._more = more
        self._policy = ResumePolicy() if policy is None else policy
        self._examine = examine

    def record_current_facts(self) -> None:
        """Take the facts and the hyperparameters now, before a resume puts others in place."""
        self._begun  # noqa: B018 (is kept from now on)
        self.built  # noqa: B018

    @cached_property
    def built(self) -> InitialHyperparameters:
        """Optimizers, schedules and modules before the resume."""
        return InitialHyperparameters.of(self._objects)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What goes into each checkpoint of this start, to be compared by the next one."""
        begun = self._begun
        groups = begun["fingerprint"].items()
        complete = {name: facts() if callable(facts) else facts for name, facts in groups}
        return {**begun, "fingerprint": complete}

    @cached_property
    def _begun(self) -> dict[str, Any]:
        """The facts; those of data sets are functions that wait for the reading processes."""
        environment = {**environment_facts(), "mesh": how_cut(self._objects)}
        of_objects = fingerprint_of(self._objects)
        more = {} if self._more is None else self._more()
        if "data" not in more:
            here = {n: x for n, x in sources_in(self._objects).items() if _is_read_here(x)}
            more = {**more, "data": begin_source_facts(here)}
        known = {name: facts for name, facts in more.items() if facts is not None}
        groups = {**of_objects, **known, "code": code_facts()}  # the last one waits for git
        return {
            "environment": environment,
            "built": _structures(self._objects),
            "settings": self._settings,
            "fingerprint": {"version": FINGERPRINT_VERSION, **groups},
        }

    def rows(
        self, stored: Mapping[str, Any], more: tuple[Difference, ...] = ()
    ) -> tuple[Difference, ...]:
        """Return all that was compared, what is the same last; nothing is refused yet.

        Args:
            stored: The facts of the checkpoint.
            more: Differences that were found elsewhere.
        """
        found = self._differences(stored, more)
        differing = {row.path for row in found}
        same = unchanged(_all_facts(stored), _all_facts(self.facts))
        known = (row for row in same if row.path not in differing and row.now is not None)
        return (*found, *known)

    def _differences(
        self, stored: Mapping[str, Any], more: tuple[Difference, ...]
    ) -> tuple[Difference, ...]:
        same = _same_software(stored, self.facts)
        given, now = flat(_group(stored, "settings")), flat(self._settings)
        if same:  # a setting that came or went is the user's
            given, now = {**dict.fromkeys(now), **given}, {**dict.fromkeys(given), **now}
        rules = {**{path: rule_of(path) for path in now}, **_NAMING}
        settings = compare(given, now, rules)
        before, prints = _group(stored, "fingerprint"), self.facts["fingerprint"]
        of_settings = {difference.path for difference in settings}
        others = self._of_fingerprints(before, prints, same_software=same)
        found = (
            *settings,
            *(difference for difference in others if difference.path not in of_settings),
            *code_differences(_group(before, "code")),
            *environment_differences(_group(stored, "environment"), self.facts["environment"]),
            *more,
            *_cut_off_code(),
        )
        if self._examine is not None:
            found = self._examine(stored, found)
        return by_severity(_unrefused(found, self._policy))

    def _of_fingerprints(
        self, before: Mapping[str, Any], now: Mapping[str, Any], *, same_software: bool
    ) -> tuple[Difference, ...]:
        """Compare facts of one version; report that those of another version are not compared."""
        version = before.get("version")
        if not before or version == FINGERPRINT_VERSION:
            sides = self._without_made_by_settings(before), self._without_made_by_settings(now)
            return fingerprint_differences(*sides, same_software=same_software)
        effect = "facts were taken otherwise: model, data and code are not compared"
        return (Difference("fingerprint", version, FINGERPRINT_VERSION, effect, "equivalent"),)

    def _without_made_by_settings(self, groups: Mapping[str, Any]) -> dict[str, Any]:
        """Return the groups without the code, and without objects that settings make."""
        others = {name for name, _ in named_objects(self._objects)} - self._made_by_settings
        return {
            name: {key: v for key, v in facts.items() if key in others}
            if name in self._made_by_settings and isinstance(facts, Mapping)
            else facts
            for name, facts in groups.items()
            if name not in ("code", "version")
        }

    @cached_property
    def uncovered(self) -> tuple[Difference, ...]:
        """What training depends on and no checkpoint can hold or compare."""
        facts = self._without_made_by_settings(self.facts["fingerprint"])
        facts.pop("eval_data", None)  # `examine` tells whether anything depends on it
        return (*uncovered_facts(facts), *_cut_off_code())

    def check_values(self, values: Any) -> None:
        """Raise where the values of a checkpoint cannot come from such a run."""
        if self._check_values is not None:
            self._check_values(values)

    @property
    def skipped(self) -> set[str]:
        """The names of what is not loaded."""
        return self._policy.not_loaded

    @property
    def is_strict(self) -> bool:
        """Whether only an exact resume is accepted."""
        return self._policy.exact_resume == "require"

    def refuse(self, where: str, differences: tuple[Difference, ...]) -> None:
        """Raise DifferenceError for what is not accepted."""
        refuse_unnamed(
            where,
            differences,
            allowed=self._policy.named,
            exact_resume=self._policy.exact_resume,
        )

    def accept(self, differences: tuple[Difference, ...]) -> None:
        """Allow other batches from the sources where a difference of the data was accepted."""
        named = [name for name in self._policy.allow if name.partition(".")[0] == "data"]
        other_data = ("changed", "not covered")
        found = [d for d in differences if d.path.startswith("data.") and d.verdict in other_data]
        for source in sources_in(self._objects).values():
            if (named or found) and isinstance(source, MapSource | LoaderSource):
                source.accept_other_data()

    def patterns(self, stored: Mapping[str, Any], *, own: bool) -> tuple[str, ...]:
        """Return the patterns of what is not loaded; a run skips each pattern only once.

        Args:
            stored: The facts of the checkpoint.
            own: Whether this very run made it.
        """
        done = stored.get("skip") if own else None
        already = done if isinstance(done, list) else []
        return tuple(pattern for pattern in self._policy.skip if pattern not in already)

    def partial(
        self, tree: Mapping[str, Any], patterns: tuple[str, ...], found: tuple[Difference, ...]
    ) -> tuple[dict[str, Any], tuple[Difference, ...]]:
        """Return the tree to load, and a difference for each part of it that is not loaded."""
        paths = {difference.path for difference in found}
        not_loaded = [
            part
            for path, part in self._policy.parts.items()
            if path in paths and part not in patterns and not self._has_class(tree, part)
        ]
        changed, named = self.added_or_removed(tree), Skip(patterns)
        not_loaded += [
            d.path for d in changed if not (named.whole("callbacks") or named.whole(d.path))
        ]
        untrained = untrained_names(found)
        if not (patterns or not_loaded or untrained):
            return dict(tree), ()
        skip = Skip((*patterns, *not_loaded), untrained)
        loaded, skipped = keep_skipped(self._objects, tree, skip)
        by_skip = [path for path in skipped if path not in not_loaded]
        return loaded, tuple(
            Difference(path, "in the checkpoint", "as built here", NOT_LOADED, "changed")
            for path in by_skip
        )

    def added_or_removed(self, tree: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Return the callbacks with a state that only one side has."""
        here, there = self._objects.get("callbacks"), tree.get("callbacks")
        if not isinstance(here, dict) or not isinstance(there, dict):
            return ()
        added = [(name, *_ADDED) for name in here if name not in there]
        removed = [(name, *_REMOVED) for name in there if name not in here]
        return tuple(
            Difference(f"callbacks.{name}", stored, now, effect, "changed")
            for name, stored, now, effect in (*added, *removed)
        )

    def _has_class(self, tree: Mapping[str, Any], part: str) -> bool:
        """Return whether an object is of the class that the checkpoint has it in."""
        live = self._objects.get(part)
        return part in tree and tree[part].class_name == stored_class_name(type(live))

    def take_effect(self, differences: tuple[Difference, ...]) -> None:
        """Apply the accepted differences after a restore."""
        take_effect(differences, self.built, self._objects)


def sources_in(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the sources of batches among registered objects, and loaders, by name."""
    kinds = (MapSource, LoaderSource, DataLoader)
    return {name: one for name, one in named_objects(objects) if isinstance(one, kinds)}


def _is_read_here(source: Any) -> bool:
    """Return whether the data are those of all ranks, or of their leader."""
    is_own = isinstance(source, LoaderSource) and not source.gives_samples
    return not is_own or source.shape.rank == 0


def fingerprint_of(objects: Mapping[str, object]) -> dict[str, Plain]:
    """Return the facts of all modules, optimizers and schedules among the objects.

    Those of the objects called "model", "optimizer" and "scheduler" stand in the group of this
    name, those of others in a group in it.

    Example:
        >>> fingerprint_of({"model": nn.Linear(2, 1)})["model"]["class"]
        'torch.nn.modules.linear.Linear'
    """
    groups: dict[str, Any] = {}
    for name, value in named_objects(objects):
        for group, (kind, describe) in _DESCRIBED.items():
            if isinstance(value, kind):
                facts = describe(value)
                groups.setdefault(group, {}).update(facts if name == group else {name: facts})
    return groups


def _cut_off_code() -> tuple[Difference, ...]:
    """Report user code that has too many functions to be compared completely."""
    left = "of your own: the rest of them is not compared"
    of_modules = f"more than {MAX_REACHED} modules {left}"
    effect = f"it runs more than {MAX_REACHED} functions and classes {left}"
    return tuple(
        Difference(f"code.{n}", None, None, of_modules if n == MODULES else effect, "not covered")
        for n in sorted(cut_off)
    )


def _structures(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return digests of how modules and optimizers are built, before training lets them grow."""
    names = ParameterNames(objects)
    return {
        path: structure_digest(value, names)
        for path, value in named_objects(objects)
        if isinstance(value, nn.Module | Optimizer)
    }


_ADDED = ("no such callback", "as built here", "added: starts with fresh state")
_REMOVED = ("with a state", "no such callback", "removed: its stored state is dropped")
_NAMING: Mapping[str, Rule] = {
    "data.cache": ("harmless", "where things are; the training is the same")
}
_DESCRIBED: Mapping[str, tuple[type, Callable[[Any], dict[str, Plain]]]] = {
    "model": (nn.Module, model_facts),
    "optimizer": (Optimizer, optimizer_facts),
    "scheduler": (LRScheduler, scheduler_facts),
}


def _unrefused(found: tuple[Difference, ...], policy: ResumePolicy) -> list[Difference]:
    """Make refused differences of objects that are not loaded acceptable."""
    effect = "begins anew: skip names it"
    return [
        replace(d, effect=effect, verdict="changed")
        if d.verdict == "refused" and is_named(d.path, policy.not_loaded)
        else d
        for d in found
    ]


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _plain_settings(value) if isinstance(value, Mapping) else plain_or_text(value)
        for name, value in settings.items()
    }


def _same_software(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the packages that facts come from are of the same versions on both sides."""
    codes = [_group(_group(side, "fingerprint"), "code").get("unbroken") for side in (stored, now)]
    before, after = _group(stored, "environment"), _group(now, "environment")
    names = [n for n in before if n in ("torch", "numpy", "python") or n[:9] == "packages."]
    return codes[0] == codes[1] and all(before[n] == after.get(n, before[n]) for n in names)


def _all_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, the fingerprint and the environment by path."""
    prints = dict(_group(facts, "fingerprint"))
    prints.pop("version", None)
    environment = {"environment": _group(facts, "environment")}
    return {**flat(_group(facts, "settings")), **flat(prints), **flat(environment)}


def _group(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}
