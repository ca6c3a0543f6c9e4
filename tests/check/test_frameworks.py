"""Stock trainers and loops of their users, each in real processes: right verdict, right culprit."""

from __future__ import annotations

import sys

import pytest

from check.trials import Trials
from unbroken.check import Culprit, Status

EXACT = (Status.EXACT, Culprit.NONE)


def broken(culprit):
    return Status.NOT_EXACT, culprit


# Loaded before the recorder comes; tests/check/test_check_command.py has a script that loads torch.
HOSTS = {
    "transformers_trainer.py": ("transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
    "accelerate_loop.py": ("accelerate",),
    "lightning_trainer.py": ("lightning",),
}

# script, kill after, words for each start, words for the resume, verdict
CASES = {
    "transformers": ("transformers_trainer.py", 10, "", "", EXACT),
    "transformers, random masking": (
        *("transformers_trainer.py", 10, "random masking", ""),
        broken(Culprit.AUGMENTATION),
    ),
    "transformers, ignore_data_skip": (
        *("transformers_trainer.py", 10, "", "ignore_data_skip"),
        broken(Culprit.DATA_RESTARTED),
    ),
    "transformers, optimizer.pt is missing": (
        *("transformers_trainer.py", 10, "", "lost optimizer"),
        broken(Culprit.OPTIMIZER),
    ),
    "transformers, resume_from_checkpoint in the arguments": (
        *("transformers_trainer.py", 10, "", "resume_from_checkpoint in the arguments"),
        broken(Culprit.FROM_SCRATCH),
    ),
    "lightning, neither shuffling nor dropout": ("lightning_trainer.py", 8, "", "", EXACT),
    "lightning, shuffling": (
        *("lightning_trainer.py", 8, "shuffle", ""),
        broken(Culprit.EPOCH_ORDER),
    ),
    "lightning, dropout": (
        *("lightning_trainer.py", 8, "dropout", ""),
        broken(Culprit.SEED_RESET),
    ),
    "lightning, in the middle of an epoch": (
        *("lightning_trainer.py", 10, "mid-epoch", ""),
        broken(Culprit.DATA_RESTARTED),
    ),
    "accelerate, at the end of an epoch": ("accelerate_loop.py", 8, "", "", EXACT),
    "accelerate, in the middle of an epoch": (
        *("accelerate_loop.py", 10, "mid-epoch", ""),
        broken(Culprit.DATA_ORDER),
    ),
    "accelerate, load_state forgotten": (
        *("accelerate_loop.py", 8, "", "forgets to load"),
        broken(Culprit.FROM_SCRATCH),
    ),
    "as torchtitan does": ("titan_like.py", 9, "", "", EXACT),
    "as torchtitan does, iter() before load_state_dict": (
        *("titan_like.py", 9, "iter() before load_state_dict", ""),
        broken(Culprit.DATA_RESTARTED),
    ),
    "as torchtitan does, without the optimizer": (
        *("titan_like.py", 9, "", "excludes the optimizer"),
        broken(Culprit.OPTIMIZER),
    ),
    "as nanoGPT does, with the generator restored": ("random_crops.py", 6, "", "", EXACT),
    "as nanoGPT does": (
        *("random_crops.py", 6, "seeds at each start", ""),
        broken(Culprit.SEED_RESET),
    ),
    "as nanoGPT does, seeds only at the first start": (
        *("random_crops.py", 6, "", "seeds only at the first start"),
        broken(Culprit.GENERATORS),
    ),
    "ours": ("ours.py", 7, "", "", EXACT),
    "ours, told never to resume": (
        *("ours.py", 7, "", "never resumes"),
        broken(Culprit.FROM_SCRATCH),
    ),
}


@pytest.fixture(scope="module")
def all_trials(tmp_path_factory, server_with):
    """The trials of each script; its kill is the same in all cases that share a start."""
    made = {}

    def trials(script, kill_after):
        key = script, kill_after
        if key not in made:
            root = tmp_path_factory.mktemp("trials")
            made[key] = Trials(root, script, kill_after, server=server_with(*HOSTS.get(script, ())))
        return made[key]

    return trials


def bug(name):
    return ("--bug", name) if name else ()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_verdict_on_a_framework(all_trials, case):
    script, kill_after, always, at_resume, expected = CASES[case]
    verdict = all_trials(script, kill_after).verdict(broken=bug(always), resumed=bug(at_resume))
    assert (verdict.status, verdict.culprit) == expected, verdict


TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return Trials(root, "two_ranks.py", kill_after=5, launcher=TORCHRUN)


@pytest.mark.slow
def test_two_ranks_are_compared_each_with_its_own_reference(two_ranks):
    verdict = two_ranks.verdict()
    assert (verdict.status, verdict.culprit) == EXACT, verdict
    assert len(two_ranks.reference().ranks) == 2


@pytest.mark.slow
def test_the_generator_of_another_rank_is_known(two_ranks):
    verdict = two_ranks.verdict(resumed=("--bug", "the generator of rank 0"))
    assert (verdict.culprit, verdict.rank) == (Culprit.WRONG_RANK, 1), verdict
