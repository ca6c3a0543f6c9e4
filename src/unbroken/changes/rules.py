"""What a difference means for the bits of a run: in a setting, an object, the machine, the code.

Each rule stands here once. Which setting has which rule stands at the setting. Facts of objects are
compared here too, as what they mean depends on one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from unbroken.changes.differences import Difference, Rule, compare
from unbroken.fingerprint import NOT_COMPARED, sampled_records
from unbroken.fingerprint.environment import PACKAGES, VARIABLES_BY_TOPIC

VERSION: Rule = ("equivalent", "another version may have other kernels, which round differently")
MACHINE: Rule = ("equivalent", "another processor or system may round differently")
PROCESSOR: Rule = ("equivalent", "libraries choose other kernels for it, which round differently")
VECTORS: Rule = ("equivalent", "wider or narrower vectors sum in another order")
THREADS: Rule = ("equivalent", "another number of threads sums in another order")
GPU: Rule = ("equivalent", "another GPU model has other kernels, which round differently")
GPU_DRIVER: Rule = ("equivalent", "another driver may compile or choose other kernels")
DETERMINISM: Rule = ("equivalent", "other kernels are chosen; some do not repeat their own bits")
FLOAT32: Rule = ("equivalent", "float32 products keep more or fewer bits")
REDUCED: Rule = ("equivalent", "sums of 16-bit products are kept with more or fewer bits")
ATTENTION: Rule = ("equivalent", "attention is computed by another kernel")
KERNELS: Rule = ("equivalent", "another library or kernel computes the same sums")
TYPES: Rule = ("equivalent", "numbers get another type where the code names none")
DENORMAL: Rule = ("equivalent", "the smallest numbers become zero, or do so no longer")
WORLD: Rule = ("equivalent", "the sums over processes run in another order")
COMPILER: Rule = ("equivalent", "other kernels are compiled, which round differently")
WAITING: Rule = ("harmless", "work waits in another way; the same is computed")
ROOM: Rule = ("harmless", "more or less room; the same is computed")
MEMORY: Rule = ("harmless", "memory is handed out in another way; the same is computed")
UNREAD: Rule = ("harmless", "fills memory that nothing should read")
CACHED_CASTS: Rule = ("harmless", "the same casts, kept or made again")
SETS: Rule = ("harmless", "the order of sets of text; nothing in unbroken depends on it")

# What a difference in a setting means: each setting of `TrainerConfig` names one of these, and so
# does each argument of a host (a trainer of another library).
CADENCE: Rule = ("harmless", "something happens at other steps; the training is the same")
LOGGING: Rule = ("harmless", "what is logged, or shown; the training is the same")
EVALUATING: Rule = ("harmless", "how evaluations run; the training is the same")
KEEPING: Rule = ("harmless", "which checkpoints are kept; the training is the same")
VERIFYING: Rule = ("harmless", "which steps are run twice, to compare; the training is the same")
STOPPING: Rule = ("harmless", "when a process saves and stops; the training is the same")
STORING: Rule = ("harmless", "how checkpoints are stored; the training is the same")
NAMING: Rule = ("harmless", "where things are; the training is the same")
LOADING: Rule = ("harmless", "how data are read; the order and the samples are the same")
JUDGING: Rule = ("harmless", "when the run ends or which checkpoint is the best")
METRIC: Rule = ("harmless", "the best so far, and the wait for a better one, begin anew")
NOT_USED: Rule = ("harmless", "not used: the optimizer or the schedule is one of your own")
RUN_LENGTH: Rule = ("harmless", "the run ends elsewhere")
ROUNDING: Rule = ("equivalent", "the same sums, rounded in another order")
SPLIT: Rule = ("equivalent", "the same samples in each step, summed in other portions")
UPDATES: Rule = ("changed", "other updates from here on; the optimizer's moments are kept")
SCHEDULE: Rule = ("changed", "another learning rate from here on, at the same step")
FORWARD: Rule = ("changed", "other gradients from here on")
ORDER: Rule = ("changed", "another order of samples from here on; the position stays in samples")
SIZE: Rule = ("changed", "steps of another size from here on; the position stays in samples")
RANDOM: Rule = ("changed", "other random numbers, and another order, from here on")
OPTIMIZER: Rule = ("refused", 'the state of one means nothing to another; skip=["optimizer"]')

_VARIABLES: Mapping[str, Rule] = {
    "threads": THREADS,
    "vectors": VECTORS,
    "float32": FLOAT32,
    "determinism": DETERMINISM,
    "kernels": KERNELS,
    "ranks": WORLD,
    "compiler": COMPILER,
    "waiting": WAITING,
    "memory": MEMORY,
    "sets": SETS,
}

_RULED: tuple[tuple[Rule, str], ...] = (
    (VERSION, "python torch numpy blas mkl onednn libc cuda hip cudnn nccl"),
    (MACHINE, "machine system"),
    (PROCESSOR, "cpu"),
    (VECTORS, "cpu_capability"),
    (THREADS, "num_threads"),
    (WAITING, "interop_threads"),
    (ROOM, "cores gpu_memory"),
    (GPU, "gpus gpu_compute_capability"),
    (GPU_DRIVER, "driver driver_cuda"),
    (DETERMINISM, "deterministic deterministic_warn_only cudnn.deterministic cudnn.benchmark"),
    (UNREAD, "fill_uninitialized_memory"),
    (FLOAT32, "float32.cuda.matmul float32.cuda.conv float32.cuda.rnn"),
    (FLOAT32, "float32.mkldnn.matmul float32.mkldnn.conv float32.mkldnn.rnn"),
    (REDUCED, "reduced_sums.bf16 reduced_sums.fp16 reduced_sums.attention"),
    (ATTENTION, "sdpa"),
    (KERNELS, "openmp cudnn.enabled mkldnn.enabled mkldnn.deterministic opt_einsum"),
    (TYPES, "default_dtype autocast.cpu autocast.cuda"),
    (CACHED_CASTS, "autocast.cache"),
    (DENORMAL, "flush_denormal"),
    (WORLD, "world_size mesh"),
)

ENVIRONMENT_RULES: Mapping[str, Rule] = {
    **{name: rule for rule, names in _RULED for name in names.split()},
    **{f"packages.{name}": VERSION for name in PACKAGES.values()},
    **{
        f"variables.{name}": _VARIABLES[topic]
        for topic, names in VARIABLES_BY_TOPIC.items()
        for name in names
    },
}
"""The verdict and the effect of each fact that differs, by its path in `environment_facts()`."""

_UNSEEN = "whether the training depends on it cannot be seen"
SCRIPT_RENAMED: Rule = ("harmless", "the script has another name; it is the same, byte for byte")
CODE_RULES: Mapping[str, Rule] = {
    "code.script": ("equivalent", f"another script was started: {_UNSEEN}"),
    "code.script_digest": ("equivalent", f"the script is not the same file: {_UNSEEN}"),
    "code.modules": ("equivalent", f"not the same file: {_UNSEEN}"),
    "code.git_commit": ("equivalent", f"another commit is checked out: {_UNSEEN}"),
    "code.git_dirty": ("equivalent", f"files differ from the commit, or do no longer: {_UNSEEN}"),
    "code.unbroken": ("equivalent", "another version of unbroken; its changelog tells of changes"),
}
"""The verdict and the effect of each fact about the code that differs."""

_FACTS: tuple[tuple[str, Rule], ...] = (
    ("model.class", ("changed", "another class of model computes from here on")),
    ("model.source.*", ("changed", "the code of this class is not what it was")),
    ("model.layer.*", ("changed", "this layer computes something else; its weights are kept")),
    ("model.eval", ("changed", "other parts are in evaluation mode from here on")),
    ("model.frozen", ("changed", "other parameters train from here on; all other state is kept")),
    ("model.attn_implementation", ATTENTION),
    ("model.*.attn_implementation", ATTENTION),
    ("model.*", ("changed", "the model computes something else; its weights are kept")),
    ("optimizer.*class", ("refused", 'its state means nothing to another; skip=["optimizer"]')),
    ("optimizer.*foreach", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*fused", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*capturable", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*", ("changed", "other updates from here on; the moments are kept")),
    ("scheduler.*", ("changed", "another learning rate from here on, at the same step")),
    ("loss.*", ("changed", "another loss is trained from here on")),
    ("trainer.*", ("changed", "the subclass of Trainer trains otherwise from here on")),
    ("data.length", ("changed", "another order of the samples; the position is kept in samples")),
    ("data.records", ("changed", "other samples from here on")),
    ("data.fingerprint", ("changed", "other samples from here on")),
    ("data.source.*", ("changed", "the code of the data set is not what it was")),
    ("data.*", ("changed", "other batches are made from here on")),
    ("state.*", ("changed", "an object in the state of the run is another one")),
    ("eval_data.*", ("changed", "other evaluations steer the learning rate")),
    ("callbacks.names", ("equivalent", "whether the training depends on it cannot be seen")),
    ("callbacks.*.source*", ("equivalent", "whether the training depends on it cannot be seen")),
    ("callbacks.*", ("equivalent", "the new value counts; the run may go on and end otherwise")),
)
"""What a difference in a fact of an object means: the first pattern that fits the path counts."""


def rule_of(path: str) -> Rule:
    """Return what a difference in a fact about an object means.

    Example:
        >>> rule_of("optimizer.class")[0]
        'refused'
    """
    known = (rule for pattern, rule in _FACTS if fnmatchcase(path, pattern))
    return next(known, ("changed", "the training depends on it"))


# What another length of a run does to a learning rate that falls to its end.


LENGTH = "schedule"
"""The path of the difference that tells of a schedule which reaches its end elsewhere, where no
setting of the length does."""

LENGTH_SETTINGS = ("max_steps", "num_train_epochs")

Factor = Callable[[int], float]
"""From a step, counted from 0, to what its learning rate is multiplied by."""

Differences = tuple[Difference, ...]


def with_schedule_length(
    settings: Differences,
    others: Differences,
    *,
    lengths: tuple[int, int],
    step: int,
    learning_rate: float,
    factor_of: Callable[[int], Factor],
    of_schedule: Collection[str],
) -> Differences:
    """Return the differing settings, with the effect of another length on the learning rate.

    Another length is another training, and has to be named. Where it follows from another change
    (of the data, of the size of a step), the schedule is listed beside that one; but not where a
    setting of the schedule differs, too.

    Args:
        settings: The differences of settings.
        others: All others.
        lengths: The steps of the run that was, and of the run now.
        step: How many steps the checkpoint has.
        learning_rate: That of the settings.
        factor_of: Returns the factor of a run with so many steps.
        of_schedule: The settings of the schedule.

    Example:
        >>> linear = lambda steps: lambda step: 1 - step / steps
        >>> found = with_schedule_length(
        ...     (), (), lengths=(4, 8), step=2, learning_rate=1.0, factor_of=linear, of_schedule=()
        ... )
        >>> found[0].path, found[0].verdict
        ('max_steps', 'changed')
    """
    if lengths[0] == lengths[1] or lengths[1] <= step:
        return settings
    before, after = factor_of(lengths[0]), factor_of(lengths[1])
    for at in _sampled(step, min(lengths)):
        rates = learning_rate * before(at), learning_rate * after(at)
        if rates[0] != rates[1]:
            found = _with_other_rates(settings, others, lengths, at, rates)
            is_known = any(one.path in of_schedule for one in settings)
            return settings if is_known and found[-1].path == LENGTH else found
    return settings


def is_another_schedule(difference: Difference) -> bool:
    """Return whether a difference is that of a schedule which another run length changes."""
    of_length = difference.path in LENGTH_SETTINGS and difference.verdict == "changed"
    return of_length or difference.path == LENGTH


def _with_other_rates(
    settings: Differences,
    others: Differences,
    lengths: tuple[int, int],
    step: int,
    rates: tuple[float, float],
) -> Differences:
    effect = (
        f"another schedule: step {step + 1} has the learning rate {rates[1]:.6g} in a run of "
        f"{lengths[1]} steps, and {rates[0]:.6g} in one of {lengths[0]}"
    )
    given = [one for name in LENGTH_SETTINGS for one in settings if one.path == name]
    if given:
        judged = replace(given[0], verdict="changed", effect=effect)
        return (*(one for one in settings if one is not given[0]), judged)
    follows = any(one.verdict in ("changed", "refused") for one in (*settings, *others))
    if follows:
        return (*settings, Difference(LENGTH, *rates, effect, "changed"))
    return (*settings, Difference("max_steps", *lengths, effect, "changed"))


def _sampled(start: int, stop: int) -> list[int]:
    """Return all steps between two, or a thousand of them."""
    return sorted({start + (stop - start) * i // 1000 for i in range(1001)} | {start})


# Fingerprints of two starts compared: what each difference means, in plain words.


_REPEATABLE, _RECORDS = ".repeatable", ".records"
OWN_GENERATOR = (
    "record 0 is not the same twice under the same key: it draws from a generator of its own, "
    "which no checkpoint holds; draw from random, numpy.random or torch, which are keyed"
)
_OWN_BATCH = OWN_GENERATOR.replace("record 0 is", "a batch of the same records is")
_OF_CODE = (".name", ".source", ".class")
_HAVE_DIFFERENCES_OF_THEIR_OWN = {
    *("records", "repeatable", "fingerprint", "length", "source", "loader"),
    *("transform", "target_transform", "transforms", "collate_fn", "tokenizer"),
}
_OPTIONAL = ("transform", "target_transform", "transforms", "collate_fn", "tokenizer")


def fingerprint_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], *, same_software: bool = False
) -> tuple[Difference, ...]:
    """Return what is not the same in two fingerprints.

    What only one of them has came or went with a version of some software; with the same
    software, the user has added it or taken it away: a hook, a method, a setting.

    Args:
        stored: From the checkpoint: groups ("model", "data", ...) of facts.
        now: Of this start.
        same_software: Whether both were taken by the same versions.

    Example:
        >>> stored = {"model": {"n_head": 2}, "data": {"length": 8}}
        >>> now = {"model": {"n_head": 4}, "data": {"length": 8}}
        >>> [(d.path, d.stored, d.now) for d in fingerprint_differences(stored, now)]
        [('model.n_head', 2, 4)]
    """
    before, after = _comparable(stored, now), _comparable(now, stored)
    unread = [_not_compared(path, before[path], after[path]) for path in _unread(before, after)]
    of_unread = {difference.path for difference in unread}
    read = {path: value for path, value in after.items() if path not in of_unread}
    compared = compare(before, read, rule_of, differs=_differs)
    found = [_with_records(difference, after) for difference in compared]
    if same_software:
        found += _added_or_removed(before, after)
    own = [_unrepeatable(path) for path in after if _is_unrepeatable(path, before, after)]
    return (*_without_repeats(found, before, after), *own, *unread)


def _with_records(difference: Difference, after: Mapping[str, Any]) -> Difference:
    """Return how many records differ, and which is the first, in place of their digests."""
    path, stored, now = difference.path, difference.stored, difference.now
    length = after.get(f"{path.removesuffix(_RECORDS)}.length")
    lists = isinstance(stored, list) and isinstance(now, list)
    if not (path.endswith(_RECORDS) and lists and isinstance(length, int)):
        return difference
    pairs = list(zip(sampled_records(length), stored, now, strict=False))
    others = [index for index, one, other in pairs if one != other]
    found = f"{len(others)} of {len(pairs)} sampled records differ (first: record {others[0]})"
    effect = f"{difference.effect}; {_SEEDED}"
    return replace(difference, stored=f"{len(stored)} records", now=found, effect=effect)


_SEEDED = "is the data seeded?"


def _is_unrepeatable(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return path.endswith(_REPEATABLE) and False in (before.get(path), after[path])


def _unrepeatable(path: str) -> Difference:
    effect = _OWN_BATCH if path.endswith(".collate_fn.repeatable") else OWN_GENERATOR
    return Difference(path, None, None, effect, "not covered")


def uncovered_facts(now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return the facts of a fingerprint that no checkpoint can hold.

    Example:
        >>> [d.path for d in uncovered_facts({"data": {"repeatable": False}})]
        ['data.repeatable']
    """
    facts = flat(now)
    return tuple(_unrepeatable(path) for path in facts if _is_unrepeatable(path, {}, facts))


def may_go_on(stored: Mapping[str, Any], callbacks: Mapping[str, Any]) -> bool:
    """Return whether a callback that could end the run has changed: then the run goes on.

    Args:
        stored: The facts of the checkpoint.
        callbacks: The facts of the callbacks of this start, by name.

    Example:
        >>> facts = {"fingerprint": {"callbacks": {"Patience": {"stops": True}}}}
        >>> may_go_on(facts, {"Patience": {"stops": True}}), may_go_on(facts, {})
        (False, True)
    """
    prints = stored.get("fingerprint")
    known = prints.get("callbacks") if isinstance(prints, Mapping) else None
    before = known if isinstance(known, Mapping) else {}
    ended = {n: one for n, one in before.items() if isinstance(one, Mapping) and one.get("stops")}
    now: Any = json.loads(json.dumps({name: callbacks.get(name) for name in ended}))
    return any(now[name] != one for name, one in ended.items())


def _added_or_removed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return facts that only one side has, unless another difference covers them."""
    groups = {path.partition(".")[0] for path in before} & {
        path.partition(".")[0] for path in after
    }
    paths = [path for path in {**before, **after} if (path in before) != (path in after)]
    alone = [path for path in paths if _says_more(path, groups, before, after)]
    return [_one_sided(path, before.get(path), after.get(path)) for path in alone]


def _says_more(
    path: str, groups: set[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> bool:
    """Return whether no other difference covers a fact that was added or removed."""
    group, _, name = path.partition(".")
    if group not in groups and group != "loss":
        return False  # evaluation data, say: nothing is compared with nothing
    if group == "callbacks":
        if name.partition(".")[0].isdigit() or name.endswith(".stops"):
            return False  # older versions knew callbacks by their places
        return before.get("callbacks.names") == after.get("callbacks.names")
    return group != "data" or name.partition(".")[0] not in _HAVE_DIFFERENCES_OF_THEIR_OWN


def _one_sided(path: str, stored: Any, now: Any) -> Difference:
    """A plain value matters only to code that names it, and that code is compared."""
    verdict, effect = rule_of(path)
    value = now if stored is None else stored
    is_setting = path.startswith(("model.", "data.values.")) and not path.endswith(_OF_CODE)
    is_plain = isinstance(value, bool | int | float | str | None)
    if verdict == "changed" and is_plain and is_setting:
        verdict, effect = "equivalent", "came or went: whether anything uses it cannot be seen"
    return Difference(path, stored, now, effect, verdict)


def _unread(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the facts that one side could not take."""
    sides = (before, after)
    return [path for path in after if path in before and any(_is_unread(s[path]) for s in sides)]


def _is_unread(fact: Any) -> bool:
    return isinstance(fact, str) and fact.startswith(NOT_COMPARED)


def _not_compared(path: str, stored: Any, now: Any) -> Difference:
    """Report facts that one side could not take: a change there would not be seen."""
    before, after = _in_short(stored), _in_short(now)
    return Difference(path, before, after, _WHY_UNREAD.get(path, "is not compared"), "equivalent")


def _in_short(fact: Any) -> Any:
    return fact.removeprefix(NOT_COMPARED) if _is_unread(fact) else f"{len(fact)} digests"


_GIVEN = "records are not compared; a string `fingerprint` of the data set would be"
_WHY_UNREAD = {"data.records": _GIVEN, "eval_data.records": _GIVEN}


def flat(groups: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"model": {"n_head": 2}} as {"model.n_head": 2}, at any depth.

    Example:
        >>> flat({"data": {"collate_fn": {"name": "pad"}, "length": 3}})
        {'data.collate_fn.name': 'pad', 'data.length': 3}
    """
    found: dict[str, Any] = {}
    for name, value in groups.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{path}."))
        else:
            found[path] = value
    return found


def _comparable(groups: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return all facts by path; a layer, or an optional part, that is missing is None."""
    facts = flat(groups)
    layers = (path for path in flat(others) if path.startswith("model.layer."))
    missing = dict.fromkeys(path for path in layers if path not in facts)
    missing |= {path: none for path, none in _NO_RECORDS.items() if _lacks(path, facts, others)}
    data = groups.get("data")
    if not isinstance(data, Mapping):
        return {**facts, **missing}
    parts = {f"data.{part}.is": _name_of(data.get(part)) for part in _OPTIONAL}
    return {**facts, **missing, **parts}


def _lacks(path: str, facts: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether the other side alone has records of data that are on both."""
    group, _, name = path.partition(".")
    there = others.get(group)
    has_data = f"{group}.length" in facts
    return has_data and path not in facts and isinstance(there, Mapping) and name in there


_NO_RECORDS = dict.fromkeys(_WHY_UNREAD, f"{NOT_COMPARED}none were read")


def _name_of(part: Any) -> Any:
    return part.get("name") if isinstance(part, Mapping) else part and "given"


def _differs(path: str, stored: Any, now: Any) -> bool:
    if path.endswith(_REPEATABLE):
        return False  # a difference of its own says so, whatever it was before
    if path.endswith(_RECORDS) and isinstance(stored, list) and isinstance(now, list):
        return any(before != after for before, after in zip(stored, now, strict=False))
    return bool(stored != now)


def _without_repeats(
    found: list[Difference], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Difference]:
    """Leave out differences that repeat another one with less detail."""
    paths = {difference.path for difference in found}
    paths -= _repeated_layers(found)
    unclear = {
        path.removesuffix(_REPEATABLE) for path in after if _is_unrepeatable(path, before, after)
    }
    paths -= {f"{group}.records" for group in unclear}  # cannot be compared
    longer = [path.removesuffix(".length") for path in paths if path.endswith(".length")]
    paths -= {f"{group}{_RECORDS}" for group in longer}  # other records by necessity
    same_records = "data.records" in before and "data.records" in after and "data" not in unclear
    kept = [difference for difference in found if difference.path in paths]
    if same_records and "data.records" not in paths and "data.length" not in paths:
        return [_softened(difference) for difference in kept]
    return kept


def _repeated_layers(found: list[Difference]) -> set[str]:
    """Return changed layers that repeat the change of another layer or of the configuration."""
    layers = [d for d in found if d.path.startswith("model.layer.")]
    others = [d for d in found if d.verdict == "changed" and d not in layers]
    of_model = [d for d in others if d.path.startswith("model.")]
    unclear = [layer for layer in layers if not _is_explained(layer, of_model)]
    first = {(str(layer.stored), str(layer.now)): layer.path for layer in reversed(unclear)}
    return {layer.path for layer in layers} - set(first.values())


def _is_explained(layer: Difference, others: Sequence[Difference]) -> bool:
    """Return whether another difference explains that of a layer: same numbers, or kind."""
    known = {(str(one.stored), str(one.now)) for one in others}
    kinds = [one for one in others if not isinstance(one.now, int | float)]
    before, after = (_WORD.findall(str(text)) for text in (layer.stored, layer.now))
    if len(before) != len(after):
        return bool(kinds)
    changed = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]} - known
    return all(kinds and not pair[1][0].isdigit() for pair in changed)


_WORD = re.compile(r"-?\d[\w.+-]*|\w+")


def _softened(difference: Difference) -> Difference:
    """New code of a data set that gives the same records is not another training."""
    if not difference.path.startswith("data.source."):
        return difference
    effect = "the code of the data set changed; the sampled records are the same"
    return replace(difference, verdict="equivalent", effect=effect)
