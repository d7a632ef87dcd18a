"""Speed, memory and losses of our training step beside PyTorch's and plain Flax's, on this machine's CPU.

    python benchmarks/train_cpu.py [--torch-python PATH] [--models 8m,llama-23m] [--sides jax,torch] [--rounds 2]
    python benchmarks/train_cpu.py --agreement     # 200 AdamW steps, losses within 1e-3; writes the golden file

Owns the order of the runs (the sides in turn, each in a process of its own, so that a noisy neighbour meets
all), the table and the JSON, which keeps the other models' figures of the same machine and versions. README.md beside
it says how to read them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.machine import machine
from nanollama.models.accounting import count_parameters

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "benchmarks" / "results" / "train_cpu.json"
GOLDEN = ROOT / "tests" / "golden" / "torch_losses_200.json"
TOLERANCE = 1e-3  # nats, at every step
RATIOS = {  # ours over theirs
    "ratio": ("jax", "torch"),
    "ratio_bf16": ("jax_bf16", "torch_bf16"),
    "ratio_compiled": ("jax", "torch_compiled"),
    "ratio_flax": ("jax", "flax"),
}
WARM_UP = 2  # steps that are not timed: compilation, first touch of memory
TORCH_HOMES = (".venv-torch", ".venv-parity")  # `make test-parity` has PyTorch, too
NO_TORCH = """no PyTorch to compare with at {path}. Make it an environment of its own, or name another (--torch-python):
    python -m venv .venv-torch
    .venv-torch/bin/pip install numpy torch"""


@contextmanager
def saved(work: workload.Workload) -> Iterator[Path]:
    """The workload as a temporary .npz, which both sides read."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "workload.npz"
        workload.save(path, work)
        yield path


def run_side(command: list[str], path: Path, **environment: str) -> dict[str, Any]:
    """One side in a fresh process; its JSON line. Errors: RuntimeError with the end of its stderr."""
    started = ["--started", str(time.time())] if "benchmarks.jax_side" in command else []
    surroundings = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([*command, str(path), *started], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sides(torch_python: Path) -> dict[str, list[str]]:
    """What to run for each side; PyTorch's only where it is."""
    ours = [sys.executable, "-m", "benchmarks.jax_side"]
    commands = {"jax": ours, "jax_bf16": [*ours, "--compute", '{"dtype": "bfloat16"}']}
    commands["flax"] = [sys.executable, "-m", "benchmarks.flax_side"]
    if torch_python.is_file():
        theirs = [str(torch_python), str(ROOT / "benchmarks" / "torch_twin.py")]
        commands |= {"torch": theirs, "torch_bf16": [*theirs, "--bf16"], "torch_compiled": [*theirs, "--compile"]}
    return commands


def summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One side's figures over all its runs; the fastest step is the one least disturbed."""
    wall = [seconds for run in runs for seconds in run["wall_seconds"][WARM_UP:]]
    processor = [seconds for run in runs for seconds in run["processor_seconds"][WARM_UP:]]
    return {
        "tokens_per_second": round(tokens / min(wall)),
        "tokens_per_second_median": round(tokens / statistics.median(wall)),
        "step_seconds_min": round(min(wall), 4),
        "step_seconds_median": round(statistics.median(wall), 4),
        "processor_seconds_min": round(min(processor), 4),
        "processor_seconds_median": round(statistics.median(processor), 4),
        "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
        "first_loss": runs[0]["losses"][0],
        "steps_timed": len(wall),
    }


def measure(name: str, commands: dict[str, list[str]], rounds: int, packed: bool) -> dict[str, Any]:
    """All sides on one model, in turn, `rounds` times."""
    work = workload.of_model(name, steps=WARM_UP + 5, packed=packed)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    with saved(work) as path, tempfile.TemporaryDirectory() as cache:
        for number in range(rounds):
            for side in sorted(commands, reverse=bool(number % 2)):
                print(f"  {name}, round {number + 1} of {rounds}: {side}", file=sys.stderr, flush=True)
                runs[side].append(run_side(commands[side], path, JAX_COMPILATION_CACHE_DIR=cache))
    result: dict[str, Any] = {side: summary(runs[side], work.rows * work.length) for side in commands}
    started = [run["first_step_after_seconds"] for run in runs["jax"]]
    result["jax"]["start_to_first_step_seconds"] = {
        "cold": round(started[0], 2),
        "warm_cache": round(min(started[1:], default=float("nan")), 2),
    }
    for name, (ours, theirs) in RATIOS.items():
        if ours in result and theirs in result:
            result[name] = ratios(result[ours], result[theirs])
    versions = {key: value for side in runs.values() for key, value in side[0]["versions"].items()}
    sizes = {"parameters": count_parameters(work.model).total, "rows": work.rows, "length": work.length}
    return {**sizes, "packed": packed, **result, "versions": versions}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs. Speeds: above 1 is faster; memory: above 1 is more."""
    return {
        "tokens_per_second": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3),
        "tokens_per_second_median": round(ours["tokens_per_second_median"] / theirs["tokens_per_second_median"], 3),
        "per_processor_second": round(theirs["processor_seconds_min"] / ours["processor_seconds_min"], 3),
        "peak_memory": round(ours["peak_memory_mib"] / theirs["peak_memory_mib"], 3),
    }


def table(models: dict[str, dict[str, Any]]) -> str:
    """The figures for people."""
    lines = [f"{'model':<14}{'batch':>9}  {'side':<15}{'tokens/s':>9}{'median':>8}{'cpu s/step':>12}{'MiB':>7}"]
    for name, result in models.items():
        for side, s in result.items():
            if isinstance(s, dict) and "processor_seconds_min" in s:
                batch = f"{result['rows']} x {result['length']}"
                lines.append(
                    f"{name:<14}{batch:>9}  {side:<15}{s['tokens_per_second']:>9,}"
                    f"{s['tokens_per_second_median']:>8,}{s['processor_seconds_min']:>12.2f}"
                    f"{s['peak_memory_mib']:>7,}"
                )
        for side in RATIOS:
            if side in result:
                r = result[side]
                lines.append(
                    f"{'':<25}{side:<15}{r['tokens_per_second']:>9.2f}{r['tokens_per_second_median']:>8.2f}"
                    f"{r['per_processor_second']:>12.2f}{r['peak_memory']:>7.2f}"
                )
    return "\n".join(lines)


def speed(names: list[str], commands: dict[str, list[str]], rounds: int, packed: bool) -> None:
    here = machine()
    models = {name: measure(name, commands, rounds, packed) for name in names}
    versions: dict[str, str] = {}
    for result in models.values():
        versions |= result.pop("versions")
    print(table(models))
    if "torch" not in commands or packed:
        return  # the committed file is the comparison only
    RESULTS.parent.mkdir(exist_ok=True)
    note = "AdamW, clipping; a ratio is ours over the other side's, fastest step over fastest step; float32 or bf16"
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    same = before.get("versions") == versions and before.get("machine", {}).get("cpu") == here["cpu"]
    models = {**(before.get("models", {}) if same else {}), **models}
    text = json.dumps({"what": note, "machine": here, "versions": versions, "models": models}, indent=1)
    RESULTS.write_text(text + "\n")
    print(f"written to {RESULTS.relative_to(ROOT)}")


def agreement(commands: dict[str, list[str]]) -> bool:
    """Losses of both sides at every step; writes PyTorch's as the golden file if they agree."""
    golden: dict[str, Any] = {"what": "losses of benchmarks/torch_twin.py on benchmarks/workload.py", "runs": {}}
    agree = True
    for packed in (False, True):
        work = workload.for_agreement(packed=packed)
        with saved(work) as path:
            # one OpenMP thread: PyTorch's threads spin at each of these small products when others want the cores
            theirs, ours = (run_side(commands[side], path, OMP_NUM_THREADS="1") for side in ("torch", "jax"))
        gaps = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        print(
            f"{work.name}: {len(gaps)} AdamW steps, loss {theirs['losses'][0]:.4f} -> {theirs['losses'][-1]:.4f}, "
            f"largest difference {gaps[worst]:.1e} at step {worst} (allowed {TOLERANCE:.0e})"
        )
        agree &= gaps[worst] <= TOLERANCE
        inputs = workload.make_weights(work) | workload.make_batches(work)
        golden["runs"][work.name] = {
            "inputs_sha256": workload.digest(inputs),
            "workload": workload.as_dict(work),
            "versions": theirs["versions"],
            "losses": [round(loss, 6) for loss in theirs["losses"]],
        }
    if agree:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden) + "\n")
        print(f"written to {GOLDEN.relative_to(ROOT)}")
    return agree


def torch_python() -> Path:
    """The first of TORCH_HOMES that is there, else where it belongs."""
    found = [ROOT / home / "bin" / "python" for home in TORCH_HOMES]
    return next((path for path in found if path.is_file()), found[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", type=Path, default=torch_python(), help="a Python that can import torch")
    parser.add_argument("--models", default="8m,llama-23m", help="8m, or presets")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", default="", help="of jax, torch, jax_bf16, torch_bf16, torch_compiled, flax; or all")
    parser.add_argument("--packed", action="store_true", help="rows of several documents; result not written")
    parser.add_argument("--agreement", action="store_true", help="compare losses instead of speed")
    arguments = parser.parse_args()
    commands = sides(arguments.torch_python)
    if "torch" not in commands:
        print(NO_TORCH.format(path=arguments.torch_python), file=sys.stderr)
        if arguments.agreement:
            return 2
    if arguments.agreement:
        return 0 if agreement(commands) else 1
    asked = arguments.sides.split(",") if arguments.sides else list(commands)
    known = {side for pair in RATIOS.values() for side in pair}
    if "jax" not in asked or not set(asked) <= known:
        parser.error(f"--sides={arguments.sides}: name jax, and any of {', '.join(sorted(known - {'jax'}))}")
    chosen = {side: command for side, command in commands.items() if side in asked}
    speed(arguments.models.split(","), chosen, arguments.rounds, arguments.packed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
