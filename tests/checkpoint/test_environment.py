"""The facts about the machine and the software, and what a difference in them means."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from unbroken.changes.rules import ENVIRONMENT_RULES
from unbroken.checkpoint import environment_differences, environment_facts
from unbroken.fingerprint.environment import VARIABLES, _gpu_count_before_use, _gpu_software, _gpus
from unbroken.store.format.canonical_json import to_canonical


def fresh_process(code):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_facts_are_flat_and_pass_through_a_manifest_unchanged():
    facts = environment_facts()
    assert json.loads(to_canonical(facts)) == facts
    assert not any(isinstance(value, dict) for value in facts.values())
    assert environment_differences(json.loads(to_canonical(facts))) == ()


def test_every_fact_has_a_rule_and_every_rule_a_fact():
    facts = set(environment_facts())
    packages = {path for path in ENVIRONMENT_RULES if path.startswith("packages.")}
    assert facts <= set(ENVIRONMENT_RULES)
    assert set(ENVIRONMENT_RULES) - packages <= facts


def test_what_identifies_a_person_or_a_machine_is_not_told(monkeypatch):
    for name in ("USER", "HOME", "HOSTNAME", "HF_TOKEN", "WANDB_API_KEY", "TORCH_HOME"):
        monkeypatch.setenv(name, "a secret of mine")
    assert "a secret of mine" not in json.dumps(environment_facts())
    assert not {name for name in VARIABLES if "PATH" in name or "DIR" in name or "HOME" in name}


def all_generators():
    position = np.random.get_state()
    return random.getstate(), position[1].tobytes(), position[2:], torch.get_rng_state().tolist()


def test_no_random_number_is_drawn():
    before = all_generators()
    environment_facts()
    assert all_generators() == before


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_a_draw_from_any_generator_would_be_seen(draw):
    before = all_generators()
    draw()
    assert all_generators() != before


def test_nothing_is_imported_and_no_threads_are_started():
    code = (
        "import sys, torch, unbroken.checkpoint as c; before = set(sys.modules)\n"
        "facts = c.environment_facts(); torch.set_num_interop_threads(3)\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(new & {'transformers', 'lightning', 'triton'}, 'packages.' in str(facts))"
    )
    assert fresh_process(code) == "set() False"


def test_packages_count_when_they_are_imported_and_are_not_made_to_load_more(monkeypatch):
    class Lazy(ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    timm, trl = Lazy("timm"), Lazy("trl")
    timm.__version__ = "1.2.3"
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "trl", trl)
    facts = environment_facts()
    assert (facts["packages.timm"], facts["packages.trl"]) == ("1.2.3", None)


BACKENDS = torch.backends
SWITCHES = {
    "num_threads": lambda on: torch.set_num_threads(2 if on else 1),
    "flush_denormal": torch.set_flush_denormal,
    "deterministic": torch.use_deterministic_algorithms,
    "cudnn.benchmark": lambda on: setattr(BACKENDS.cudnn, "benchmark", on),
    "cudnn.deterministic": lambda on: setattr(BACKENDS.cudnn, "deterministic", on),
    "float32.cuda.conv": lambda on: setattr(
        BACKENDS.cudnn.conv, "fp32_precision", "tf32" if on else "ieee"
    ),
    "mkldnn.deterministic": lambda on: setattr(BACKENDS.mkldnn, "deterministic", on),
    "mkldnn.enabled": lambda on: setattr(BACKENDS.mkldnn, "enabled", on),
    "sdpa": BACKENDS.cuda.enable_flash_sdp,
    "reduced_sums.attention": BACKENDS.cuda.allow_fp16_bf16_reduction_math_sdp,
    "default_dtype": lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
}
ON_BY_DEFAULT = {"float32.cuda.conv", "mkldnn.enabled", "sdpa"}


@pytest.mark.parametrize("path", SWITCHES)
def test_a_switch_of_torch_that_is_thrown_is_told_as_equivalent(path):
    threads, is_on = torch.get_num_threads(), path in ON_BY_DEFAULT
    SWITCHES[path](is_on)
    before = environment_facts()
    try:
        SWITCHES[path](not is_on)
        found = {d.path: d.verdict for d in environment_differences(before)}
    finally:
        SWITCHES[path](is_on)
        torch.set_num_threads(threads)
    assert found == {f"environment.{path}": "equivalent"}


@pytest.mark.parametrize("way", ["set_float32_matmul_precision('high')", "NEW = 'tf32'"])
def test_tf32_is_seen_however_it_was_switched_on_also_in_both_ways_at_once(way):
    code = (
        "import torch, unbroken.checkpoint as c; torch.set_float32_matmul_precision('highest')\n"
        f"torch.{way}\nprint(c.environment_facts()['float32.cuda.matmul'])"
    )
    new = "backends.cuda.matmul.fp32_precision"
    assert fresh_process(code.replace("NEW", new)) == "tf32"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("NVIDIA_TF32_OVERRIDE", "equivalent"),
        ("CUBLAS_WORKSPACE_CONFIG", "equivalent"),
        ("ATEN_CPU_CAPABILITY", "equivalent"),
        ("PYTHONHASHSEED", "harmless"),
        ("CUDA_LAUNCH_BLOCKING", "harmless"),
    ],
)
def test_a_variable_that_is_set_or_unset_is_a_difference(monkeypatch, name, verdict):
    monkeypatch.delenv(name, raising=False)
    before = environment_facts()
    monkeypatch.setenv(name, "0")
    (found,) = environment_differences(before)
    assert (found.path, found.verdict) == (f"environment.variables.{name}", verdict)
    assert (found.stored, found.now) == (None, "0")


def test_the_gravest_difference_stands_first():
    stored = {"interop_threads": 1, "num_threads": 1}
    found = environment_differences(stored, {"interop_threads": 2, "num_threads": 2})
    assert [difference.verdict for difference in found] == ["equivalent", "harmless"]


def test_what_only_one_side_has_is_no_difference():
    now = {"torch": "2.13.0", "packages.peft": "0.15"}
    assert environment_differences({"packages.trl": "1.0", "old": 1}, now) == ()


def test_another_version_of_a_package_is_a_difference():
    now = {"packages.transformers": "5.1.0"}
    (found,) = environment_differences({"packages.transformers": "5.0.0"}, now)
    assert found.verdict == "equivalent"
    assert "another version" in found.effect


def gpu_facts(*names):
    details = {"gpu_memory": [80] * len(names), "gpu_compute_capability": ["9.0"] * len(names)}
    return {"gpus": [*names], **details, "cudnn": 91000 if names else None}


@pytest.mark.parametrize(
    ("stored", "now", "values", "words"),
    [
        (["H200"], ["A100"], ("1 x H200", "1 x A100"), "another GPU model"),
        (["A100"] * 2, ["A100"], ("2 x A100", "1 x A100"), "another number of them"),
        (["H200"], [], ("1 x H200", "none"), "runs on the CPU now"),
        ([], ["H200"], ("none", "1 x H200"), "runs on the CPU now"),
        (["A100", "H200"], ["H200", "A100"], ("1 x A100, 1 x H200",) * 2, "in another order"),
    ],
)
def test_other_gpus_are_told_in_one_line(stored, now, values, words):
    (found,) = environment_differences(gpu_facts(*stored), gpu_facts(*now))
    assert sorted(found.stored.split(", ")) == sorted(values[0].split(", "))
    assert sorted(found.now.split(", ")) == sorted(values[1].split(", "))
    assert words in found.effect


def test_gpus_that_were_not_looked_at_are_no_difference():
    unknown = dict.fromkeys(("gpus", "gpu_memory", "gpu_compute_capability"))
    assert environment_differences(gpu_facts("H200"), {**unknown, "cudnn": 91000}) == ()
    assert environment_differences({**unknown, "cudnn": 91000}, gpu_facts("H200")) == ()


@pytest.fixture
def two_gpus(monkeypatch):
    """A torch that tells of two GPUs, and whether anyone asked it to use one."""
    gpu = SimpleNamespace(name="H200", total_memory=141_000_000_000, major=9, minor=0)
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: asked.append(i) or gpu)
    for cached in (_gpu_count_before_use, _gpu_software, _gpus):
        cached.cache_clear()
    yield asked
    for cached in (_gpu_count_before_use, _gpu_software, _gpus):
        cached.cache_clear()


def test_gpus_are_left_alone_until_the_program_uses_them(two_gpus, monkeypatch):
    assert environment_facts()["gpus"] is None
    assert two_gpus == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    facts = environment_facts()
    assert (facts["gpus"], facts["gpu_compute_capability"]) == (["H200"] * 2, ["9.0"] * 2)


def test_asking_does_not_initialise_cuda():
    code = "import torch, unbroken.checkpoint as c; c.environment_facts()"
    assert fresh_process(f"{code}; print(torch.cuda.is_initialized())") == "False"
