"""Our training step on this GPU: tokens per second, MFU and memory, plain and packed; beside torch.compile.

    python benchmarks/train_gpu.py --case=1b               # 23m, 125m, 1b, 1b-full, 7b; or tiny, on any device
    python benchmarks/train_gpu.py --case=1b --peer-python=PYTHON    # the twin instead: PYTHON can import torch

Rows of 4,096 tokens in bfloat16 over float32 weights, AdamW; random weights and text. The first of a case's settings
(rows, remat) that the plan's formula fits into the card's memory is run, the next where memory runs out. Packed rows
hold four documents cut at random places that do not see each other. `memory` compares the formula with what XLA's
compiler says and with the allocator's peak. The twin is `torch_twin.py` with autocast, torch.compile, fused AdamW and,
for packed rows, flex_attention, at the same rows. Needs jax, flax, optax, numpy and einops only.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from benchmarks import workload
from benchmarks.jax_side import config_of
from benchmarks.machine import RESULTS, write
from nanollama.accelerators import peak_flops
from nanollama.config import ComputeConfig, Config, ModelConfig
from nanollama.models.accounting import MFU_CONVENTION, count_parameters, mfu
from nanollama.models.decoder import Decoder
from nanollama.models.families import preset
from nanollama.parallel import backend
from nanollama.parallel.mesh import make_mesh, mesh_sizes
from nanollama.planning import here
from nanollama.planning.memory import estimate
from nanollama.planning.targets import GIB
from nanollama.training.optim import make_optimizer
from nanollama.training.state import init_state
from nanollama.training.step import make_train_step, put_batch

ROOT = Path(__file__).resolve().parent.parent
Keep = Callable[[dict[str, Any]], None]  # writes the figures there are, in case this program is stopped

WARM_UP, TIMED, GROUPS = 2, 4, 3  # steps that are not timed; steps timed together, and how often
BATCHES = 2  # different ones, in turn
AUTOTUNE = "--xla_gpu_deterministic_ops=false --xla_gpu_enable_triton_gemm=true"  # what the same bits cost
ROOM = 0.92  # of the memory, for what the formula puts too low
TINY = ModelConfig(256, 64, 128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides how much memory a step needs."""

    rows: int
    remat: Literal["none", "dots", "names", "full"] = "none"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and its settings from the one wanted most."""

    model: ModelConfig
    settings: tuple[Setting, ...]
    length: int = 4096
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"


def cases() -> dict[str, Case]:
    """By name."""
    billion = ModelConfig(**preset("nanollama-1b"))
    seven, full = ModelConfig(**preset("llama-7b")), tuple(Setting(rows, "full") for rows in (16, 8, 4, 2, 1))
    return {
        "tiny": Case(TINY, (Setting(2),), 64),
        "23m": Case(ModelConfig(**preset("llama-23m")), (Setting(128), Setting(64)), 1024),
        "125m": Case(ModelConfig(**preset("llama-124m")), (Setting(16), Setting(8), Setting(8, "names"))),
        "1b": Case(billion, (Setting(8), Setting(4), Setting(4, "dots"), Setting(4, "names"))),
        "1b-full": Case(billion, full),
        "7b": Case(seven, full[2:], 4096, "bfloat16"),
    }


def config(case: Case, setting: Setting, *, packed: bool, dtype: Literal["float32", "bfloat16"]) -> Config:
    """The run. Plain rows promise that they are one document, so that cuDNN may be used."""
    work = workload.Workload("train_gpu", case.model, setting.rows, case.length, steps=BATCHES, packed=packed)
    made = config_of(work, ComputeConfig(dtype=dtype, remat=setting.remat, loss_chunk_tokens=4096))
    optimizer = dataclasses.replace(made.optimizer, momentum_dtype=case.momentum_dtype)
    return dataclasses.replace(
        made, optimizer=optimizer, data=dataclasses.replace(made.data, mask_documents=packed)
    )


def measure(case: Case, setting: Setting, dtype: Literal["float32", "bfloat16"], keep: Keep) -> dict[str, Any]:
    """Figures of one setting, plain and packed. Errors: XLA's, where memory does not do."""
    result: dict[str, Any] = {"rows": setting.rows, "remat": setting.remat}
    for name in ("plain", "packed"):
        run = config(case, setting, packed=name == "packed", dtype=dtype)
        mesh, optimizer = make_mesh(run.mesh, jax.devices()[:1]), make_optimizer(run)
        state, shardings = init_state(run, optimizer, mesh)
        step = make_train_step(run, Decoder(run.model, run.compute), optimizer, mesh, shardings)
        text = workload.make_batches(
            workload.Workload(name, run.model, setting.rows, case.length, BATCHES, packed=name == "packed")
        )
        batches = [put_batch({key: x[i] for key, x in text.items()}, run, mesh) for i in range(BATCHES)]
        started = time.perf_counter()
        compiled = step.lower(state, batches[0]).compile()
        compiling = time.perf_counter() - started
        losses, times = [], []
        for group in range(GROUPS + 1):
            started, count = time.perf_counter(), TIMED if group else WARM_UP
            for number in range(count):
                state, metrics = compiled(state, batches[number % BATCHES])
            losses.append(float(metrics["loss"]))
            times.append((time.perf_counter() - started) / count)
        result[name] = {
            **speed(case, setting, times[1:]), "compile_seconds": round(compiling, 1),
            "losses": [round(loss, 4) for loss in losses], "finite": bool(np.isfinite(losses).all()),
        }  # fmt: skip
        if name == "plain":
            result["memory"] = memory(run, compiled)
        keep(result)
        del state, compiled, step, batches
    return result


def speed(case: Case, setting: Setting, seconds: list[float]) -> dict[str, Any]:
    """Of step times: the fastest, the middle one, and MFU where the data sheet of the device is known."""
    tokens, best = setting.rows * case.length, min(seconds)
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = mfu(case.model, case.length, tokens / best, 1.0)
    return {
        "tokens_per_second": round(tokens / best),
        "tokens_per_second_median": round(tokens / statistics.median(seconds)),
        "step_seconds": round(best, 5),
        "model_tflops": round(flops / 1e12, 2),
        "mfu": round(flops / peak, 4) if peak else None,
    }


def memory(run: Config, compiled: Any) -> dict[str, Any]:
    """GiB by the plan's formula, by XLA's compiler, and at the allocator's peak (where the device tells)."""
    told, device = compiled.memory_analysis(), jax.devices()[0]
    kernel = device.platform != "cpu"
    formula = estimate(run, mesh_sizes(run.mesh, 1), kernel=kernel)
    of_compiler = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    of_compiler += told.temp_size_in_bytes
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    measured = peak or of_compiler
    return {
        "formula_gib": round(formula.total / GIB, 4),
        "compiler_gib": round(of_compiler / GIB, 4),
        "peak_gib": round(peak / GIB, 4) if peak else None,
        "formula_over_measured": round(formula.total / measured, 4),
        "measured_by": "allocator" if peak else "compiler",
    }


def ours(case: Case, dtype: Literal["float32", "bfloat16"], keep: Keep) -> dict[str, Any]:
    """The first setting that fits. Errors: RuntimeError where none does."""
    room, skipped = here.device_memory(1), []
    for setting in case.settings:
        run = config(case, setting, packed=False, dtype=dtype)
        needed = estimate(run, mesh_sizes(run.mesh, 1), kernel=jax.default_backend() != "cpu").total
        if room and needed > ROOM * room:
            skipped.append(f"{setting.rows} rows, remat {setting.remat}: {needed / GIB:.1f} GiB by formula")
            continue
        try:
            return {**measure(case, setting, dtype, keep), "skipped": skipped}
        except Exception as error:  # XlaRuntimeError is not public under one name in all versions
            if not here.out_of_memory(error):
                raise
            skipped.append(f"{setting.rows} rows, remat {setting.remat}: out of memory when run")
    raise RuntimeError(f"nothing fits the memory of {jax.devices()[0].device_kind}: {'; '.join(skipped)}")


def theirs(case: Case, python: Path, device: str, rows: int, keep: Keep) -> dict[str, Any]:
    """The twin at `rows` rows (0: the case's first settings, whichever fits), plain and packed."""
    settings = [s for s in case.settings if not rows or s.rows == rows] or [Setting(rows)]
    result: dict[str, Any] = {"skipped": []}
    for setting in settings:
        for name in ("plain", "packed"):
            steps = WARM_UP + 2 * TIMED
            work = workload.Workload(name, case.model, setting.rows, case.length, steps, packed=name == "packed")
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "workload.npz"
                workload.save(path, work, weights=False)
                command = [str(python), str(ROOT / "benchmarks" / "torch_twin.py"), str(path), f"--device={device}"]
                command += ["--bf16", "--compile"] if device == "cuda" else []
                command += ["--remat"] if setting.remat != "none" else []
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]
                result["skipped"].append(f"{name}, {setting.rows} rows, remat {setting.remat}: {why}")
                continue
            run = json.loads(done.stdout.splitlines()[-1])
            best = min(run["wall_seconds"][WARM_UP:])
            result[name] = {
                "tokens_per_second": round(setting.rows * case.length / best), "step_seconds": round(best, 5),
                "peak_gib": round(run["peak_memory_mib"] / 1024, 2), "rows": setting.rows, "remat": setting.remat,
                "losses": [round(run["losses"][0], 4), round(run["losses"][-1], 4)], "versions": run["versions"],
            }  # fmt: skip
            keep(result)
        if "plain" in result:
            return result
    raise RuntimeError(f"the twin did not run: {'; '.join(result['skipped'])}")


def show(name: str, figures: dict[str, Any]) -> None:
    """For people."""
    for kind in ("plain", "packed"):
        if kind in figures:
            f = figures[kind]
            used = f"{f['mfu']:>7.1%} MFU" if f.get("mfu") else ""
            print(f"{name:<10}{kind:<8}{f['tokens_per_second']:>10,} tokens/s{f['step_seconds'] * 1e3:>10.1f} ms{used}")
    if "memory" in figures:
        m = figures["memory"]
        peak = f"{m['peak_gib']:.2f}" if m["peak_gib"] else "not told"
        print(f"{'':<10}memory  formula {m['formula_gib']:.2f} GiB, compiler {m['compiler_gib']:.2f}, peak {peak}")
    for line in figures["skipped"]:
        print(f"{'':<10}skipped {line}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(cases()), default="1b")
    parser.add_argument("--rows", type=int, default=0, help="rows of the twin; default: the case's first that fits")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--autotune", action="store_true", help="without the flags that make a run deterministic")
    parser.add_argument("--peer-python", type=Path, help="run PyTorch's twin with this Python instead of ours")
    parser.add_argument("--peer-device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: results/train_gpu_CASE.json")
    options = parser.parse_args(arguments)
    case, name = cases()[options.case], options.case + ("_torch" if options.peer_python else "")
    out = options.out or RESULTS / f"train_gpu_{name.replace('-', '_')}.json"
    about = {"case": options.case, "parameters": count_parameters(case.model).total, "length": case.length}

    def keep(figures: dict[str, Any]) -> None:
        what = f"training steps on one device; {MFU_CONVENTION}"
        write(out, what, {**about, **figures}, "jax", "flax", "optax", "numpy", "torch")

    if options.peer_python:
        jax.config.update("jax_platforms", "cpu")  # the card is the twin's
        figures = theirs(case, options.peer_python, options.peer_device, options.rows, keep)
    else:
        if options.autotune:  # before JAX starts; what the user names is left alone
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {AUTOTUNE}"
        backend.start()
        figures = ours(case, options.dtype, keep)
    show(name, figures)
    keep(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
