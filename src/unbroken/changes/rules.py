"""What a difference means for the bits of a run: in a setting, an object, the machine, the code.

Each rule stands here once. Which setting has which rule stands at the setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from unbroken.changes.differences import Rule
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
# does each argument of a host.
CADENCE: Rule = ("harmless", "something happens at other steps; the training is the same")
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
