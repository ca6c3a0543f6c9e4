"""What each fact about the machine and the software means for the bits of a run.

The names of the environment variables and packages that are looked at stand here alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from unbroken.changes.differences import Rule

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
_VARIABLES: tuple[tuple[Rule, str], ...] = (
    (THREADS, "OMP_NUM_THREADS OMP_THREAD_LIMIT OMP_DYNAMIC MKL_NUM_THREADS MKL_DYNAMIC"),
    (THREADS, "OPENBLAS_NUM_THREADS"),
    # Which instructions the CPU libraries may use; MKL_CBWR pins MKL's order of sums.
    (VECTORS, "ATEN_CPU_CAPABILITY MKL_CBWR MKL_ENABLE_INSTRUCTIONS OPENBLAS_CORETYPE"),
    (VECTORS, "ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA NPY_DISABLE_CPU_FEATURES"),
    # oneDNN may compute float32 in bfloat16; the others switch TF32 on or off behind torch's flags.
    (FLOAT32, "ONEDNN_DEFAULT_FPMATH_MODE DNNL_DEFAULT_FPMATH_MODE"),
    (FLOAT32, "NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    # With another workspace than :4096:8 or :16:8, cuBLAS does not repeat its own bits.
    (DETERMINISM, "CUBLAS_WORKSPACE_CONFIG"),
    (KERNELS, "CUBLASLT_WORKSPACE_SIZE TORCH_BLAS_PREFER_CUBLASLT DISABLE_ADDMM_CUDA_LT"),
    (KERNELS, "TORCH_LINALG_PREFER_CUSOLVER TORCH_CUDNN_V8_API_DISABLED"),
    # NCCL sums along rings or trees, by a switch or by the GPUs.
    (WORLD, "NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE NCCL_COLLNET_ENABLE"),
    (COMPILER, "TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE TORCHINDUCTOR_MAX_AUTOTUNE"),
    (WAITING, "CUDA_LAUNCH_BLOCKING TORCH_NCCL_BLOCKING_WAIT"),
    (MEMORY, "PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF"),
    (SETS, "PYTHONHASHSEED"),
)
VARIABLES: tuple[str, ...] = tuple(name for _, names in _VARIABLES for name in names.split())
"""The environment variables that are looked at, and no others."""

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
    **{f"variables.{name}": rule for rule, names in _VARIABLES for name in names.split()},
}
"""The verdict and the effect of each fact that differs, by its path in `environment_facts()`."""
