"""The command line under the real torchrun, restarts included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from distributed.training import STEPS, train
from fresh import free_port
from scenarios import metrics, outcome

CONFIG = """
output_dir: run
max_steps: 6
batch_size: 8
micro_batch_size: 2
lanes: 4
save_steps: 2
logging_steps: 1
log_data_digest: true
model: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}
data: {tokenizer: bytes, block_size: 16}
"""


def torchrun(folder, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "unbroken", "train", "config.yaml", *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_then_one_give_the_metrics_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(CONFIG)
    assert torchrun(tmp_path / "one", 1).returncode == 0
    first = torchrun(tmp_path / "two", 2, "--max_steps", "4", "--lr_scheduler_type", "constant")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("step 4/4") == 1
    again = torchrun(tmp_path / "two", 1, "--allow", "lr_scheduler_type", "max_steps")
    assert again.returncode == 0, again.stderr
    digests = [
        [line["data_digest"] for line in metrics(tmp_path / name / "run")]
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parents[1]), os.environ.get("PYTHONPATH", "")]),
    "RES_OPTIONS": "timeout:1 attempts:1",
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3"]


def whole(folder, settings: dict, world_size: int) -> dict:
    """Return what the run ends with that nobody touched."""
    assert run_ranks(train, str(folder), settings, world_size=world_size) == [0] * world_size
    return told(folder)


def told(folder) -> dict:
    found = outcome(folder, STEPS)
    return {key: found[key] for key in ("tensors", "metrics")}


def starts(folder) -> list[dict]:
    events = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "started"]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "deaths"), [({}, 3), ({"lanes": 4}, 1)])
def test_restarts_after_random_kills_end_with_the_bits_of_an_untouched_run(
    settings, deaths, tmp_path
):
    ranks = 2
    expected = whole(tmp_path / "whole", settings, 1 if settings else ranks)
    script = [str(SCRIPTS / "train_and_die.py"), str(tmp_path / "run"), json.dumps(settings)]
    command = [*LAUNCHER, "--nproc-per-node", str(ranks), *script, str(deaths)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") == deaths
    assert len(starts(tmp_path / "run")) == deaths + 1
    assert told(tmp_path / "run") == expected


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lanes": 4}], ids=["ranks", "lanes"])
def test_an_elastic_world_goes_on_with_the_node_that_is_left(settings, tmp_path):
    rendezvous = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    rendezvous += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    # Waited for in whole where a node is lost. The second node starts first, and so is not late.
    quick = "last_call_timeout=7,keep_alive_interval=1,keep_alive_max_attempt=2,is_host="
    command = [*LAUNCHER, *rendezvous, "--nproc-per-node", "1", "--rdzv-conf"]
    script = [str(SCRIPTS / "train_on_nodes.py"), str(tmp_path)]
    nodes = {}
    for node, is_host in (("second", 0), ("first", 1)):
        words = [*script, node, json.dumps({"micro_batch_size": 2, **settings})]
        nodes[node] = subprocess.Popen(
            [*command, f"{quick}{is_host}", *words],
            env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    _, errors = nodes["first"].communicate(timeout=150)
    nodes["second"].communicate(timeout=30)
    assert (nodes["first"].returncode, nodes["second"].returncode) == (0, -9), errors
    assert (tmp_path / "worlds").read_text().split() == ["2", "1"]
    again = starts(tmp_path / "run")[-1]
    assert (again["step"], again["verdict"]) == (3, "exact" if settings else "equivalent")
    if settings:
        expected = whole(tmp_path / "whole", {"micro_batch_size": 2, **settings}, 1)
        assert told(tmp_path / "run") == expected
