"""Start-up of the JAX backend: flags, threads, virtual devices, compilation cache, a check of its arithmetic.

Owns everything that must happen before the first use of a JAX device. Knows nothing of models, configs or
meshes: only jax, numpy and the standard library, so that a kernel can be measured where nothing else is.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.version import __version__ as JAXLIB_VERSION

# The pool of every elastic run: XLA:CPU's sums depend on its size, so 1 to 8 devices must share one.
ELASTIC_THREADS = 8
# Pool threads per CPU device of a run of several processes: 2 processes x 2 devices stood still with a pool of 2.
GLOO_THREADS = 4
REFUSED_JAXLIB = {
    "0.10.2": "silently computes wrong sums on CPU (jax-ml/jax#39103)",
    "0.11.0": "crashes on fused reductions on CPU (jax-ml/jax#39257)",
}
INSTALL_FIX = "pip install --upgrade 'jax>=0.10.1,!=0.10.2,!=0.11.0'"

# Speed flags, with the jaxlib versions [first, end) known to accept them: XLA aborts the process on a flag it
# does not know, so an untried version gets none. oneDNN matmuls end before 0.11: jaxlib 0.12.0.1 computes wrong
# gradients with them (`transposed_addition` below, docs/decisions.md). LLVM keeps to vectors of 256 bits, which spared
# the first processors with AVX-512 their lower clock; where there are 512 it now uses them, elsewhere nothing changes.
_TRIED = ((0, 10, 1), (0, 13))
_UNTIL_IGNORED = ((0, 10, 1), (0, 12))  # later ones accept and ignore it
CPU_FLAGS = {
    "--xla_cpu_experimental_onednn_custom_call=true": ((0, 10, 1), (0, 11)),
    "--xla_cpu_prefer_vector_width=512": _TRIED,
}
# GPU: the same bits in every run, and collectives that run beside the products of other layers. Deterministic means
# that XLA times nothing and takes the first program that can make a product, which is Triton's with tiles nobody chose;
# without Triton it is the one that cuBLASLt's own heuristic puts first. Also, scatter-adds become loops or huge sorts:
# the train step has none (`ops.embedding`, `ops.moe.route`). Read off XLA's source and compiled programs; not measured.
GPU_FLAGS = {
    "--xla_gpu_deterministic_ops=true": _TRIED,
    "--xla_gpu_enable_triton_gemm=false": _TRIED,
    "--xla_gpu_enable_latency_hiding_scheduler=true": _TRIED,
    "--xla_gpu_enable_pipelined_all_gather=true": _UNTIL_IGNORED,
    "--xla_gpu_enable_pipelined_all_reduce=true": _UNTIL_IGNORED,
    "--xla_gpu_enable_pipelined_reduce_scatter=true": _UNTIL_IGNORED,
}
# Share of a GPU's memory that a run takes, as the plan counts on (JAX alone takes three quarters). The rest is for
# CUDA's context, its libraries and NCCL.
GPU_MEMORY = 0.92
# TPU: none. Its compiler reads LIBTPU_INIT_ARGS, overlaps collectives as it comes, and refuses what it does not know.
FLAGS = {"cpu": CPU_FLAGS, "gpu": GPU_FLAGS, "tpu": {}}
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


# glibc's madvise(MADV_HUGEPAGE) for all of malloc. It is read when a process starts, never later.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class BackendError(RuntimeError):
    """The installed or running JAX backend cannot be trusted with a run; the message says what to do."""


def start(*, elastic: bool = False, devices: int | None = None, processes: int = 1) -> None:
    """Prepare the JAX backend and check that it computes correctly; call before any use of `jax.devices()`.

    `elastic` pins the CPU thread pool, which the elastic determinism mode needs. `devices` asks for that many
    virtual CPU devices; `processes` is how many processes share the run. Calling again with the same needs does
    nothing. A user's own XLA_FLAGS, JAX_COMPILATION_CACHE_DIR, XLA_PYTHON_CLIENT_MEM_FRACTION and (outside elastic
    mode) NPROC are respected.

    Errors: BackendError on a jaxlib known to be wrong or found to be wrong, when the backend already runs with other
    settings than are asked for, or no device is.
    """
    refuse_version(JAXLIB_VERSION)
    if devices is not None and devices < 1:
        raise BackendError(f"--devices={devices}: give 1 or more.")
    if devices is not None and elastic and devices > ELASTIC_THREADS:
        raise BackendError(
            f"{devices} devices with elastic determinism: its thread pool serves up to "
            f"{ELASTIC_THREADS}. Use fewer devices, or determinism='same_mesh'."
        )
    if _running():
        _check_running(elastic, devices)
    else:
        where = expected_platform()
        os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), JAXLIB_VERSION, where)
        if where == "gpu":
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
        if elastic:
            os.environ["NPROC"] = str(ELASTIC_THREADS)
        elif processes > 1:  # a collective of gloo blocks its thread: with too few for all devices none goes on
            # At least as many as elastic runs, so that 2 x 2 and 4 x 1 devices share a pool size: sums depend on it.
            os.environ.setdefault("NPROC", str(max(pool_threads(), ELASTIC_THREADS, GLOO_THREADS * (devices or 1))))
        if devices is not None:
            jax.config.update("jax_num_cpu_devices", devices)
        _use_compilation_cache()
    check_arithmetic()
    check_fusion()


def use_huge_pages() -> None:
    """Start this program anew with huge pages for its memory, unless the user set GLIBC_TUNABLES; Linux only.

    XLA:CPU asks for a step's working memory anew at every step. In pages of 4 KiB the kernel then takes an eighth
    of the processor time for page faults (llama-23m, 4 x 512: 286,000 faults a step, 4.37 cpu-s; with huge pages
    2,000 and 3.79), at the same peak memory. Costs the imports made so far, about a second: call it first.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update(HUGE_PAGES)
        os.execv(sys.executable, sys.orig_argv)


def give_back_memory() -> None:
    """Return to the system what malloc keeps for later; does nothing where the C library is not glibc.

    Compiling a step leaves 400 MiB of it (llama-23m: 1,054 MiB resident become 637), in pieces that the step's own
    memory, asked for in one, never fits into.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def refuse_version(version: str) -> None:
    """Raise BackendError for a jaxlib version known to compute wrongly or to crash."""
    if version in REFUSED_JAXLIB:
        raise BackendError(f"jaxlib {version} {REFUSED_JAXLIB[version]}. Install another: {INSTALL_FIX}")


def expected_platform() -> str:
    """cpu, gpu or tpu: what JAX will run on, as far as can be told before it starts."""
    asked = (os.environ.get("JAX_PLATFORMS") or "").partition(",")[0].lower()
    if asked:
        return "gpu" if asked in ("cuda", "rocm", "gpu") else asked
    installed = {"gpu": _CUDA_PLUGINS, "tpu": ("libtpu",)}
    found = (name for name, modules in installed.items() if any(map(importlib.util.find_spec, modules)))
    return next(found, "cpu")


def known_flags(platform: str, version: str = JAXLIB_VERSION) -> list[str]:
    """A platform's flags that jaxlib `version` is known to accept."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return [flag for flag, (first, end) in FLAGS.get(platform, {}).items() if first <= release < end]


def with_flags(flags: str, version: str, platform: str = "cpu") -> str:
    """XLA_FLAGS with a platform's flags, save those the user already names or jaxlib `version` may not know."""
    ours = [flag for flag in known_flags(platform, version) if flag.partition("=")[0] not in flags]
    return " ".join([*flags.split(), *ours])


def sums_of_squares(rows: np.ndarray) -> np.ndarray:
    """jit(vmap(sum((eye(3) @ row)**2))) of `rows` [N, 3] -> [N]: the program jaxlib 0.10.2 gets wrong."""
    function = jax.jit(jax.vmap(lambda row: jnp.sum(jnp.matmul(jnp.eye(3), row, precision="highest") ** 2)))
    return np.asarray(function(jax.device_put(rows)))


@functools.cache
def check_arithmetic(program: Callable[[np.ndarray], np.ndarray] = sums_of_squares) -> None:
    """Start-up canary: compare a small fused program with NumPy, exactly; BackendError when it differs.

    32,769 rows is the smallest size at which jaxlib 0.10.2 goes wrong in float32. Costs about 0.1 s, once.
    """
    rows = np.zeros((32_769, 3), np.float32)
    rows[:, 0] = np.arange(len(rows))
    expected, got = (rows**2).sum(axis=1), program(rows)
    wrong = int(np.count_nonzero(got != expected))
    if wrong:
        raise BackendError(
            f"jaxlib {JAXLIB_VERSION} on {jax.default_backend()} computes wrong sums: {wrong} "
            f"of {len(rows)} differ, the last is {got[-1]:.0f} instead of {expected[-1]:.0f}. "
            f"A model trained on it would be worthless. Install another: {INSTALL_FIX}"
        )


def transposed_addition(p_BGTS: np.ndarray, q_BGTK: np.ndarray, a_BGSK: np.ndarray) -> np.ndarray:
    """jit((p^T q + a) transposed to [B, S, G, K]): a piece of attention's backward pass.

    jaxlib 0.12.0.1 with --xla_cpu_experimental_onednn_custom_call=true adds `a` without transposing it.
    """
    function = jax.jit(lambda p, q, a: jnp.swapaxes(jnp.matmul(jnp.swapaxes(p, 2, 3), q) + a, 1, 2))
    return np.asarray(function(*jax.device_put((p_BGTS, q_BGTK, a_BGSK))))


@functools.cache
def check_fusion(program: Callable[..., np.ndarray] = transposed_addition) -> None:
    """Second canary: a matmul fused with what follows it, against NumPy; BackendError when it is far off."""
    shapes = ((2, 4, 64, 128), (2, 4, 64, 32), (2, 4, 128, 32))
    p, q, a = (np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape) for shape in shapes)
    error = float(np.max(np.abs(program(p, q, a) - (np.swapaxes(p, 2, 3) @ q + a).swapaxes(1, 2))))
    if not error < 0.5:  # it is 1.99 where `a` is misplaced, and below 0.1 with bfloat16 matmuls
        raise BackendError(
            f"jaxlib {JAXLIB_VERSION} on {jax.default_backend()} with XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r} "
            f"computes a wrong sum: off by {error:.2g}. A model trained on it would be worthless. Remove the flags, or "
            f"install another: {INSTALL_FIX}"
        )


def pool_threads() -> int:
    """Threads in XLA:CPU's pool: NPROC where it is set, else the cores this process may use."""
    return int(os.environ.get("NPROC") or len(os.sched_getaffinity(0)))


def _running() -> bool:
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # options are attributes made at import
    try:  # JAX refuses to change this once a backend is up: the one public way to ask
        jax.config.update("jax_num_cpu_devices", devices + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", devices)
    return False


def _check_running(elastic: bool, devices: int | None) -> None:
    if elastic and pool_threads() != ELASTIC_THREADS:
        raise BackendError(
            f"elastic determinism needs a pool of {ELASTIC_THREADS} threads, but JAX already "
            f"runs with {pool_threads()}. Call backend.start(elastic=True) before any use of "
            f"jax.devices(), or set NPROC={ELASTIC_THREADS} in the environment."
        )
    if devices is not None and jax.device_count() != devices:
        raise BackendError(
            f"{devices} devices asked for, but JAX already runs with {jax.device_count()}. "
            "Call backend.start(devices=...) before any use of jax.devices()."
        )


def _processor() -> str:
    """Short hash of this processor's instructions; different machines may share a home folder."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.machine() + platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, apart for each processor type and thread count.

    JAX's cache key holds neither, but code for another processor may crash, and code compiled for another
    pool may sum in another order.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "nanollama" / "jax")
    directory = base / f"{_processor()}-threads-{pool_threads()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "no compilation cache, so start-up is slower: %s. Set "
            "JAX_COMPILATION_CACHE_DIR to a writable folder.",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
