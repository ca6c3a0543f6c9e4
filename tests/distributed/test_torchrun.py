"""The command line under the real torchrun, restarts included."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scenarios import metrics

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
    again = torchrun(tmp_path / "two", 1, "--allow", "lr_scheduler_type")
    assert again.returncode == 0, again.stderr
    digests = [
        [line["data_digest"] for line in metrics(tmp_path / name / "run")]
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
