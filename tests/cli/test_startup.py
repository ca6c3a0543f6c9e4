"""Commands that only look at files do not pay for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
from unbroken.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "numpy", "transformers", "tokenizers", "pydantic"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "command",
    [
        "ls gpt2",
        "show gpt2",
        "verify gpt2",
        "diff gpt2 gpt2/checkpoint-10",
        "diff gpt2 config.yaml",
        "--help",
        "verify --help",
        "demo --help",
    ],
)
def test_a_command_on_files_imports_neither_torch_nor_numpy_nor_pydantic(run, here, command):
    (here / "config.yaml").write_text("learning_rate: 3e-4\n")
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, *command.split()],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


def test_the_probe_sees_torch_where_it_is_imported(here):
    probe = PROBE.replace("main(sys.argv[1:])", "import torch")
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
    assert b"imported ['numpy', 'torch']" in ended.stderr


def test_settings_are_checked_without_pydantic(here):
    probe = "import sys, unbroken; unbroken.TrainerConfig(); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
