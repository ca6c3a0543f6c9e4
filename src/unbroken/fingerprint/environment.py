"""The machine, the software and the code that a run's bits depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from unbroken.fingerprint.source_code import user_module_digests
from unbroken.store import Json
from unbroken.store.format.canonical_json import digest_of

# Which code a run was started from: the script, and the commit of its repository.


# What git knows of a folder: the commit that is checked out, and whether files differ from it.


_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_LINKS = 5  # a reference that names a reference


def read_commit(folder: Path, *, seconds: float = 1.0) -> str | None:
    """Return the commit that is checked out in the repository around a folder.

    It is read from the files of git, so that git need not be installed. Only where they do not
    tell (git may keep its references in a table) git is asked.

    Args:
        folder: An absolute path, in a repository or its worktree or not.
        seconds: How long git may take.

    Returns:
        40 or 64 hexadecimal digits; None if there is no repository, or no commit in it yet.
    """
    git = _git_folder(folder)
    if git is None:
        return None
    commit = _resolve(git) or _ask(folder, seconds, "rev-parse", "--verify", "HEAD")
    return commit if commit is not None and _HASH.fullmatch(commit) else None


def is_dirty(folder: Path, *, seconds: float = 1.0) -> bool | None:
    """Return whether a tracked file of the repository around a folder differs from its commit.

    Files that git does not track do not count. Nothing in the repository is written or locked.

    Args:
        folder: An absolute path.
        seconds: How long git may take.

    Returns:
        None if there is no repository or no git, or if it takes longer.
    """
    if _git_folder(folder) is None:
        return None
    listed = _ask(folder, seconds, "status", "--porcelain", "--untracked-files=no")
    return None if listed is None else listed != ""


def changes_digest(folder: Path, *, seconds: float = 1.0) -> str | None:
    """Return a digest of how tracked files around a folder differ from the commit; None: not."""
    if not is_dirty(folder, seconds=seconds):
        return None
    text = _ask(folder, seconds, "diff", "--no-ext-diff", "--no-color", "HEAD")
    return None if text is None else digest_of(text.encode())


def _git_folder(folder: Path) -> Path | None:
    """Return where git keeps its files for a folder: .git, or what a file of that name names."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        link = _text(git)  # worktrees and submodules
        if link is not None and link.startswith("gitdir: "):
            return parent / link.removeprefix("gitdir: ")
        if (git / "HEAD").is_file():
            return git
    return None


def _resolve(git: Path) -> str | None:
    """Follow HEAD through references to a commit."""
    shared = git / (_text(git / "commondir") or "")
    found = _text(git / "HEAD")
    for _ in range(_MAX_LINKS):
        if found is None or not found.startswith("ref: "):
            return found
        name = found.removeprefix("ref: ")
        found = _text(git / name) or _text(shared / name) or _packed(shared, name)
    return None


def _packed(shared: Path, name: str) -> str | None:
    lines = (_text(shared / "packed-refs") or "").splitlines()
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {name}")), None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _ask(folder: Path, seconds: float, *arguments: str) -> str | None:
    """Return what git prints; None if it is not there, fails, or takes too long."""
    # As a hook of git, this process may have been told of another repository.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        done = subprocess.run(  # noqa: S603  # no shell; the arguments are those of this file
            ["git", "-c", "core.fsmonitor=false", *arguments],  # noqa: S607  # git is where PATH has it
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_PACKAGE = "unbroken"
_SITES = {"site-packages", "dist-packages"}


def code_facts() -> dict[str, Json]:
    """Return which code this process was started from.

    The facts are those of the first call: a file that is edited while training runs was loaded
    before. That call takes as long as `git status`, one second at most. No file or folder is
    written, and no path is told.

    Returns:
        `script`: the file name of the script, or the module of `python -m`; None in a notebook
        or an interpreter. `script_digest`: of its bytes. `modules`: digests of the files of the
        user's own modules that are loaded, by name. `git_commit` and `git_dirty` (whether
        tracked files differ from it): of the repository that the script is in. `unbroken`: the
        version. Of installed commands (`unbroken train`, pytest) only the name is told: their
        packages' versions say what they are. None: there is none, or it could not be known.

    Example:
        >>> sorted(code_facts())
        ['git_commit', 'git_dirty', 'modules', 'script', 'script_digest', 'unbroken']
    """
    return dict(_facts())


@cache
def _facts() -> dict[str, Json]:
    return code_facts_of(sys.modules.get("__main__"))


def code_facts_of(main: ModuleType | None) -> dict[str, Json]:
    """Return the facts about a process whose main module is `main`."""
    name, path = _name_and_path(main)
    digest, commit, dirty = None, None, None
    if path is not None and not _is_installed(main, path):
        digest = _digest(path)
        commit, dirty = read_commit(path.parent), is_dirty(path.parent)
    return {
        "script": name,
        "script_digest": digest,
        "modules": {**user_module_digests()},
        "git_commit": commit,
        "git_dirty": dirty,
        "unbroken": vars(sys.modules[_PACKAGE])["__version__"],  # imports point down
    }


def _name_and_path(main: ModuleType | None) -> tuple[str | None, Path | None]:
    file = getattr(main, "__file__", None)
    if file is None:  # a notebook, an interpreter, python -c
        return None, None
    path = Path(file).resolve()
    spec = getattr(main, "__spec__", None)
    return path.name if spec is None else spec.name.removesuffix(".__main__"), path


def _is_installed(main: ModuleType | None, path: Path) -> bool:
    """Return whether a main module is not the user's own: unbroken's, or an installed command."""
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == _PACKAGE:
        return True
    if _SITES & set(path.parts):
        return True
    folders = [sysconfig.get_path(name) for name in ("stdlib", "scripts")]
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _digest(path: Path) -> str | None:
    try:
        return digest_of(path.read_bytes())
    except OSError:
        return None


PACKAGES: Mapping[str, str] = {
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "pytorch_lightning": "pytorch-lightning",
    "peft": "peft",
    "trl": "trl",
    "datasets": "datasets",
    "diffusers": "diffusers",
    "timm": "timm",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "torchdata": "torchdata",
    "torchao": "torchao",
    "triton": "triton",
    "flash_attn": "flash-attn",
    "xformers": "xformers",
    "deepspeed": "deepspeed",
    "bitsandbytes": "bitsandbytes",
    "transformer_engine": "transformer-engine",
    "scipy": "scipy",
    "PIL": "pillow",
    "cv2": "opencv-python",
    "albumentations": "albumentations",
    "webdataset": "webdataset",
}
"""Modules that a training's bits may depend on, and the packages that bring them."""

# Values of these are numbers and words of their libraries: no paths, names or secrets.
VARIABLES_BY_TOPIC: Mapping[str, tuple[str, ...]] = {
    "threads": (
        *("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS", "MKL_DYNAMIC"),
        "OPENBLAS_NUM_THREADS",
    ),
    # Which instructions the CPU libraries may use; MKL_CBWR pins MKL's order of sums.
    "vectors": (
        *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE"),
        *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "NPY_DISABLE_CPU_FEATURES"),
    ),
    # oneDNN may compute float32 in bfloat16; the others switch TF32 on or off behind torch's flags.
    "float32": (
        *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
        *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    ),
    # With another workspace than :4096:8 or :16:8, cuBLAS does not repeat its own bits.
    "determinism": ("CUBLAS_WORKSPACE_CONFIG",),
    "kernels": (
        *("CUBLASLT_WORKSPACE_SIZE", "TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT"),
        *("TORCH_LINALG_PREFER_CUSOLVER", "TORCH_CUDNN_V8_API_DISABLED"),
    ),
    # NCCL sums along rings or trees, by a switch or by the GPUs.
    "ranks": ("NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"),
    "compiler": (*("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_MAX_AUTOTUNE"),),
    "waiting": ("CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"),
    "memory": ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    "sets": ("PYTHONHASHSEED",),
}
"""The environment variables that are looked at, by what they steer."""

VARIABLES: tuple[str, ...] = tuple(n for names in VARIABLES_BY_TOPIC.values() for n in names)
"""The environment variables that are looked at, and no others."""


_BACKENDS: Any = torch.backends  # its switches are values that the type checker takes for classes
_SMALLEST_NORMAL = sys.float_info.min
GPU_SOFTWARE = ("cuda", "hip", "cudnn", "nccl", "driver", "driver_cuda")
GPU_DETAILS = ("gpus", "gpu_memory", "gpu_compute_capability")


def environment_facts() -> dict[str, Json]:
    """Return what this process runs on, as a flat mapping of paths to JSON values.

    No random number is drawn, nothing heavy is imported, and CUDA is not initialised. It takes
    a tenth of a millisecond, the first call a few. Nothing in it names a user, a
    host or a path. None means: not there, not set, or not known. `changes.rules` has a line on
    each path.

    Asking for the name of a GPU would initialise CUDA: a context of some hundred MB, and
    no forking of workers that use it. So `gpus`, `gpu_memory` (bytes) and
    `gpu_compute_capability` are None until the program itself has used CUDA, and empty lists
    where there is no GPU.

    Returns:
        Versions (`python`, `torch`, ..., and `packages.*` for those that are imported), the
        machine, numbers of threads, all switches of torch that choose kernels or roundings,
        and `variables.*`, a chosen list of environment variables.

    Example:
        >>> facts = environment_facts()
        >>> facts["torch"] == torch.__version__, facts["world_size"]
        (True, 1)
    """
    return {
        **_software(),
        **_packages(),
        **_machine(),
        **_gpus(_gpu_count()),
        **_threads(),
        **_determinism(),
        **_float32(),
        **_kernels(),
        **_types(),
        **_world(),
        **{f"variables.{name}": os.environ.get(name) for name in VARIABLES},
    }


@cache
def _software() -> dict[str, Json]:
    build = torch.__config__.show()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "blas": _first(r"BLAS_INFO=(\w+)", build),
        "mkl": _first(r"Math Kernel Library Version (\S+)", build),
        "onednn": _first(r"MKL-DNN v(\S+)", build),
        "openmp": _BACKENDS.openmp.is_available(),
        "libc": _libc(),
    }


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return None if found is None else found[1]


def _libc() -> str | None:
    """Return the version of the C library, whose exp and log also serve NumPy and torch."""
    name = "CS_GNU_LIBC_VERSION"
    return os.confstr(name) if name in getattr(os, "confstr_names", {}) else None


def _packages() -> dict[str, Json]:
    """Return the versions of the packages that matter and are imported; import none."""
    imported = [name for name in PACKAGES if sys.modules.get(name) is not None]
    return {f"packages.{PACKAGES[name]}": _version(name, PACKAGES[name]) for name in imported}


@cache
def _version(module: str, package: str) -> str | None:
    # Not getattr: modules that load their parts when asked may load a lot.
    known = vars(sys.modules[module])
    version = known.get("__version__")
    if not isinstance(version, str):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:  # on the path, but never installed
            return None
    return version + _checkout(known.get("__file__"))


def _checkout(file: object) -> str:
    """Return the commit and the changes of a package that is used from a checkout of its own."""
    if not isinstance(file, str) or "-packages" in file:
        return ""
    folder = Path(file).resolve().parent
    commit = None if "-packages" in str(folder) else read_commit(folder)
    if commit is None:
        return ""
    changes = changes_digest(folder)
    return f" at commit {commit[:12]}" + (f" with changes {changes[:8]}" if changes else "")


@cache
def _machine() -> dict[str, Json]:
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpu_capability": _BACKENDS.cpu.get_cpu_capability(),
    }


def _cpu_name() -> str | None:
    """Return the model of the processor: a name, or on ARM the numbers of its maker and part."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return platform.processor() or None
    lines = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text, re.MULTILINE))
    arm = [lines[key] for key in ("CPU implementer", "CPU part") if key in lines]
    return lines.get("model name") or " ".join(arm) or None


def _gpu_count() -> int | None:
    """Return the number of GPUs; None where there are some that must not be looked at yet."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.device_count()
    return None if _gpu_count_before_use() else 0


@cache
def _gpu_count_before_use() -> int:
    return torch.cuda.device_count()  # torch asks NVML, which initialises nothing


@cache
def _gpus(count: int | None) -> dict[str, Json]:
    if count is None:
        return {**_gpu_software(), **dict.fromkeys(GPU_DETAILS)}
    if count == 0:
        return {**dict.fromkeys(GPU_SOFTWARE), **{name: [] for name in GPU_DETAILS}}
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        **_gpu_software(),
        "gpus": [gpu.name for gpu in found],
        "gpu_memory": [gpu.total_memory for gpu in found],
        "gpu_compute_capability": [f"{gpu.major}.{gpu.minor}" for gpu in found],
    }


@cache
def _gpu_software() -> dict[str, Json]:
    """Return the versions that matter where there is a GPU; asking initialises nothing."""
    newest = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # noqa: SLF001
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": _BACKENDS.cudnn.version(),
        "nccl": _nccl(),
        "driver": _driver(),
        "driver_cuda": f"{newest // 1000}.{newest % 1000 // 10}" if newest else None,
    }


def _nccl() -> str | None:
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module, as it tells it itself."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace")
    except OSError:
        return None
    return _first(r"NVRM version:.*?\s(\d+\.[\d.]+)", text)


def _threads() -> dict[str, Json]:
    return {
        "num_threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cores": usable_cores(),
    }


def usable_cores() -> int:
    """Return how many cores this process may run on.

    Example:
        >>> usable_cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _determinism() -> dict[str, Json]:
    cudnn = _BACKENDS.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
    }


def _float32() -> dict[str, Json]:
    """Return how exactly each library multiplies float32: "ieee", "tf32" or "bf16".

    `torch.get_float32_matmul_precision` and `allow_tf32` say the same less exactly, and raise
    where a program has used the older and the newer switches.
    """
    cuda, cudnn, mkldnn = _BACKENDS.cuda, _BACKENDS.cudnn, _BACKENDS.mkldnn
    found = {
        "cuda.matmul": cuda.matmul.fp32_precision,
        "cuda.conv": cudnn.conv.fp32_precision,
        "cuda.rnn": cudnn.rnn.fp32_precision,
        "mkldnn.matmul": mkldnn.matmul.fp32_precision,
        "mkldnn.conv": mkldnn.conv.fp32_precision,
        "mkldnn.rnn": mkldnn.rnn.fp32_precision,
    }
    exact = {"none": "ieee"}  # nobody has asked for less
    return {f"float32.{name}": exact.get(value, value) for name, value in found.items()}


def _kernels() -> dict[str, Json]:
    cuda, mkldnn, einsum = _BACKENDS.cuda, _BACKENDS.mkldnn, _BACKENDS.opt_einsum
    attention = {
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return {
        "sdpa": [name for name, is_enabled in attention.items() if is_enabled],
        "reduced_sums.bf16": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "reduced_sums.fp16": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "reduced_sums.attention": cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "mkldnn.enabled": mkldnn.is_available() and mkldnn.enabled,
        "mkldnn.deterministic": mkldnn.deterministic,
        "opt_einsum": einsum.is_available() and einsum.enabled,
    }


def _types() -> dict[str, Json]:
    return {
        "default_dtype": str(torch.get_default_dtype()),
        "autocast.cpu": str(torch.get_autocast_dtype("cpu")),
        "autocast.cuda": str(torch.get_autocast_dtype("cuda")),
        "autocast.cache": torch.is_autocast_cache_enabled(),
        # torch can set this mode of the processor, but not tell it.
        "flush_denormal": _SMALLEST_NORMAL / 2 == 0.0,
    }


def _world() -> dict[str, Json]:
    distributed = torch.distributed
    is_one_of_many = distributed.is_available() and distributed.is_initialized()
    return {"world_size": distributed.get_world_size() if is_one_of_many else 1, "mesh": None}
