"""Start-up of the backend: what it refuses, what it sets, and that its canary catches a wrong sum."""

import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from jaxlib.version import __version__ as JAXLIB_VERSION

from nanollama.parallel import backend
from nanollama.parallel.backend import (
    BackendError,
    check_arithmetic,
    check_fusion,
    refuse_version,
    with_flags,
)
from nanollama.planning import targets


def python(program, **environment):
    """Run `program` in a process of its own, without the settings of this one."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "NPROC", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0"])
def test_bad_jaxlib_is_refused_with_its_fix(version):
    with pytest.raises(BackendError, match=rf"jaxlib {version} .*Install another: pip install"):
        refuse_version(version)


def test_good_jaxlib_is_accepted():
    refuse_version("0.10.1")
    refuse_version(JAXLIB_VERSION)


def wrong_last_row(rows):
    """What jaxlib 0.10.2 computes: the last row's sum is off."""
    sums = (rows**2).sum(axis=1)
    sums[-1] = 1065369600
    return sums


def test_canary_passes_here_and_catches_a_wrong_sum():
    check_arithmetic()
    with pytest.raises(BackendError) as caught:
        check_arithmetic(wrong_last_row)
    message = str(caught.value)
    assert f"jaxlib {JAXLIB_VERSION}" in message
    assert "1065369600 instead of 1073741824" in message
    assert "!=0.10.2" in message


def test_canary_compares_every_row():
    def one_wrong(rows):
        sums = (rows**2).sum(axis=1)
        sums[17] = np.nextafter(sums[17], np.float32(np.inf))
        return sums

    with pytest.raises(BackendError, match="1 of 32769 differ"):
        check_arithmetic(one_wrong)


def test_canary_catches_a_matmul_fused_wrongly():
    def added_without_its_transpose(p, q, a):
        """What jaxlib 0.12.0.1 computes with oneDNN matmuls."""
        return (np.swapaxes(p, 2, 3) @ q).swapaxes(1, 2) + a.reshape(2, 128, 4, 32)

    check_fusion()
    with pytest.raises(BackendError, match="computes a wrong sum"):
        check_fusion(added_without_its_transpose)


@pytest.mark.skipif(JAXLIB_VERSION != "0.12.0.1", reason="the version seen to be wrong")
def test_canary_refuses_the_flag_that_makes_gradients_wrong():
    flag = "--xla_cpu_experimental_onednn_custom_call=true"
    ran = python("from nanollama.parallel import backend; backend.start()", XLA_FLAGS=flag)
    assert ran.returncode != 0
    assert "Remove the flags" in ran.stderr


def test_flags_are_added_once_and_never_over_the_users():
    onednn, wide = "--xla_cpu_experimental_onednn_custom_call", "--xla_cpu_prefer_vector_width=512"
    assert with_flags("", "0.10.1") == f"{onednn}=true {wide}"
    assert with_flags("--xla_x=1", "0.10.1") == f"--xla_x=1 {onednn}=true {wide}"
    assert with_flags(f"{onednn}=false", "0.10.1") == f"{onednn}=false {wide}"
    assert with_flags("--xla_cpu_prefer_vector_width=256", "0.12.0") == "--xla_cpu_prefer_vector_width=256"
    assert with_flags(with_flags("", "0.10.1"), "0.10.1") == f"{onednn}=true {wide}"
    assert with_flags("", "0.10.0") == ""  # XLA aborts on what it does not know: untried versions get nothing
    assert with_flags("", "0.12.0.1") == wide  # it computes wrong gradients with oneDNN


@pytest.mark.parametrize("platform", backend.FLAGS)
def test_the_installed_jaxlib_accepts_each_flag(platform):
    """Flags are parsed by every build of XLA, so a GPU's are tried without one."""
    flags = with_flags("", JAXLIB_VERSION, platform)
    assert python("import jax; jax.devices()", XLA_FLAGS=flags).returncode == 0
    assert flags.split() == backend.known_flags(platform)
    assert (platform != "gpu") or {"--xla_gpu_deterministic_ops=true", "--xla_gpu_enable_triton_gemm=false"} <= set(
        flags.split()
    )


def test_the_platform_is_told_before_jax_starts(monkeypatch):
    for asked, expected in (("cpu", "cpu"), ("cuda,cpu", "gpu"), ("tpu", "tpu")):
        monkeypatch.setenv("JAX_PLATFORMS", asked)
        assert backend.expected_platform() == expected
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    assert backend.expected_platform() == "gpu"


def test_an_unknown_flag_would_be_noticed():
    ran = python("import jax; jax.devices()", XLA_FLAGS="--xla_cpu_no_such_flag=true")
    assert ran.returncode != 0
    assert "xla_cpu_no_such_flag" in ran.stderr


STATE = """
import os, jax
from nanollama.parallel import backend
backend.start({arguments})
backend.start({arguments})
cache = jax.config.jax_compilation_cache_dir
print(jax.device_count(), os.environ.get("NPROC"), cache, os.environ["XLA_FLAGS"])
"""


@pytest.mark.parametrize(
    ("arguments", "devices", "threads"),
    [("", 1, None), ("devices=2", 2, None), ("elastic=True, devices=4", 4, backend.ELASTIC_THREADS)],
)
def test_start_sets_devices_threads_cache_and_flags(tmp_path, arguments, devices, threads):
    ran = python(STATE.format(arguments=arguments), XDG_CACHE_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    got_devices, got_threads, cache, *flags = ran.stdout.split()
    assert (int(got_devices), got_threads) == (devices, str(threads))
    pool = threads or len(os.sched_getaffinity(0))
    processor = r"[0-9a-f]{8}"  # programs of one processor or pool never serve another
    assert re.fullmatch(f"{tmp_path}/nanollama/jax/{processor}-threads-{pool}", cache)
    assert flags == with_flags("", JAXLIB_VERSION).split()


@pytest.mark.parametrize(("given", "taken"), [(None, "0.92"), ("0.5", "0.5")])
def test_a_gpu_run_takes_the_memory_that_the_plan_counts_on(given, taken):
    """The platform is made up: no device is started."""
    code = """
import os, unittest.mock
from nanollama.parallel import backend
quiet = dict.fromkeys(["check_arithmetic", "check_fusion", "_use_compilation_cache"], lambda: None)
with unittest.mock.patch.multiple(backend, expected_platform=lambda: "gpu", **quiet):
    backend.start()
print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"], os.environ["XLA_FLAGS"])
"""
    ran = python(code, **({"XLA_PYTHON_CLIENT_MEM_FRACTION": given} if given else {}))
    assert ran.returncode == 0, ran.stderr
    share, *flags = ran.stdout.split()
    assert share == taken and flags == backend.known_flags("gpu")
    assert targets.parse("h100").device.memory == float("0.92") * 80 * targets.GIB


def test_no_writable_cache_is_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    ran = python(STATE.format(arguments=""), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file"))
    assert ran.returncode == 0, ran.stderr
    assert "no compilation cache" in ran.stderr


def test_a_running_backend_is_checked_not_changed():
    with pytest.raises(BackendError, match="--devices=0: give 1 or more"):
        backend.start(devices=0)
    backend.start(elastic=True, devices=8)  # as the tests' conftest did
    with pytest.raises(BackendError, match="3 devices asked for, but JAX already runs with 8"):
        backend.start(devices=3)


def test_elastic_needs_its_pool(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(BackendError, match="needs a pool of 8 threads"):
        backend.start(elastic=True)
    with pytest.raises(BackendError, match="16 devices with elastic"):
        backend.start(elastic=True, devices=16)


def test_huge_pages_start_the_program_anew_once():
    program = "import os, sys; from nanollama.parallel import backend; backend.use_huge_pages(); " + (
        "print(os.environ['GLIBC_TUNABLES'], os.getpid(), sys.orig_argv[1:2])"
    )
    child = python(program, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert child.stdout.startswith("glibc.malloc.check=0"), "the user's own setting stands"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as child:
        printed = child.stdout.read().split()
    if sys.platform == "linux":
        assert printed == ["glibc.malloc.hugetlb=1", str(child.pid), "['-c']"], "same process, same arguments"


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_malloc_keeps_is_given_back() -> None:
    program = (
        "import numpy as np; from nanollama.parallel.backend import give_back_memory\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "arrays = [np.ones(2048) for _ in range(8000)]\n"  # 125 MiB, in pieces too small for mappings of their own
        "kept = arrays[::500] + arrays[-1:]; del arrays; before = resident()\n"
        "give_back_memory(); print(before - resident())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60, done.stdout
