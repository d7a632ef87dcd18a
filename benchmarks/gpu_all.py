"""All benchmarks of one GPU in one command of under ten minutes. Needs jax, flax, optax, numpy and einops only.

    python benchmarks/gpu_all.py                       # -> results/gpu.json, written after every part
    python benchmarks/gpu_all.py --torch-python=PYTHON # default: this Python; without torch the twins are left out
    python benchmarks/gpu_all.py --parts=ceilings,isolation
    python benchmarks/gpu_all.py --smoke --out=FILE    # tiny sizes on any device: tries the program, not the speed

Parts, in order of worth: the card's ceilings; attention (tiles tuned for the models that follow, then the table);
training beside torch.compile, plain and packed, and the plan's memory formula beside what was used; packing isolation;
generation beside transformers. Each is a process of its own with a limit of its own: one that fails or hangs costs
its part and no more. What is done is not done again: run the same command once more for what there was no time for,
`--fresh` begins anew. Measured tiles go to the cache folder that training reads ($XDG_CACHE_HOME or ~/.cache).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import RESULTS, versions

ROOT = Path(__file__).resolve().parent.parent

BUDGET = 570  # seconds of all parts together
LEAST = 15  # seconds: with less left no part is begun
WITHIN = 0.10  # of measured memory: what is promised of the plan's formula
TORCH = "{torch}"  # in a command: the Python that has PyTorch


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of benchmarks/, what it is given, and seconds after which it is stopped."""

    name: str
    limit: int
    command: tuple[str, ...]  # a program and its arguments; --out is added
    after: str = ""  # a train part whose rows the twin takes, as --rows


def parts() -> list[Part]:
    """For one GPU, from what is wanted most."""
    return [
        Part("ceilings", 60, ("ceilings.py",)),
        # Heads as in nanollama-1b (8 query heads a KV head) and llama-7b, so that training finds these tiles.
        Part("attention 64", 150, ("attention.py", "--tune", "--lengths=4096", "--head-dims=64", "--group=8")),
        Part("train 1b", 120, ("train_gpu.py", "--case=1b")),
        Part("torch 1b", 120, ("train_gpu.py", "--case=1b", f"--peer-python={TORCH}"), "train 1b"),
        Part("isolation", 60, ("isolation.py",)),
        Part("attention 128", 150, ("attention.py", "--tune", "--lengths=4096", "--head-dims=128")),
        Part("train 7b", 120, ("train_gpu.py", "--case=7b")),
        Part("train 125m", 90, ("train_gpu.py", "--case=125m")),
        Part("torch 125m", 90, ("train_gpu.py", "--case=125m", f"--peer-python={TORCH}"), "train 125m"),
        Part("decode", 90, ("decode.py", "--model=nanollama-1b", "--dtype=bfloat16", "--batches=1,16",
                            f"--peer-python={TORCH}")),
        Part("train 1b-full", 60, ("train_gpu.py", "--case=1b-full")),
        Part("train 23m", 60, ("train_gpu.py", "--case=23m")),
        Part("attention long", 120, ("attention.py", "--lengths=1024,16384")),
    ]  # fmt: skip


def smoke_parts() -> list[Part]:
    """The same programs, so small that any device runs them in seconds."""
    return [
        Part("ceilings", 300, ("ceilings.py", "--size=64", "--copy-mb=1")),
        Part("attention 64", 300, ("attention.py", "--interpret", "--lengths=32", "--head-dims=16", "--repeats=1")),
        Part("train 1b", 300, ("train_gpu.py", "--case=tiny", "--dtype=float32")),
        Part("isolation", 300, ("isolation.py", "--length=32", "--head-dims=16", "--backends=auto,cudnn")),
        Part("decode", 300, ("decode.py", "--model=tiny", "--batches=2", "--prompt=16", "--tokens=4", "--rounds=1")),
    ]


def run(part: Part, limit: float, torch: Path, given: dict[str, Any]) -> dict[str, Any]:
    """{status: done, failed, stopped or left out; seconds; figures or why}. What the part prints is passed on."""
    program, *arguments = (word.replace(TORCH, str(torch)) for word in part.command)
    if part.after:
        if given.get(part.after, {}).get("status") != "done":
            return {"status": "left out", "why": f"{part.after!r} has no figures to stand beside"}
        arguments.append(f"--rows={given[part.after]['figures']['rows']}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory) / "figures.json", Path(directory) / "log"
        command = [sys.executable, str(ROOT / "benchmarks" / program), *arguments, f"--out={out}"]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=surroundings(), stderr=errors, start_new_session=True
            )  # a session of its own: it is ended with what it started
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # and what it started: a twin that goes on would hold the card
                end(process)
        result = {"seconds": round(time.monotonic() - started, 1), "command": [program, *part.command[1:]]}
        if out.is_file():
            figures = json.loads(out.read_text())
            return {"status": "failed" if status else "done", **result, "figures": figures}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = f"stopped after {limit:.0f} s" if status is None else (lines or [f"status {status}"])[-1][:300]
        return {"status": "stopped" if status is None else "failed", **result, "why": why}


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a part's whole process group; nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def surroundings() -> dict[str, str]:
    """JAX takes the memory that a whole run would; one cache of compiled programs for all parts."""
    set_here = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTHONPATH": str(ROOT)}
    return {**set_here, **os.environ}


def without_torch(wanted: list[Part]) -> list[Part]:
    """The parts that are left where there is no PyTorch: ours alone."""
    alone = [part for part in wanted if not part.after]
    return [
        dataclasses.replace(part, command=tuple(word for word in part.command if TORCH not in word)) for part in alone
    ]


def has_torch(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0


def verdicts(done: dict[str, Any]) -> dict[str, Any]:
    """What is read off several parts: shares of the ceiling, ratios to torch, memory against the formula, leaks."""
    figures = {name: part["figures"] for name, part in done.items() if "figures" in part}
    found: dict[str, Any] = {}
    top = figures.get("ceilings", {}).get("matmul_tflops")
    for name, f in figures.items():
        if not name.startswith("train "):
            continue
        case, memory = name.removeprefix("train "), f["memory"]
        twin = figures.get(f"torch {case}", {})
        found[name] = {
            "of_matmul_ceiling": round(f["plain"]["model_tflops"] / top, 3) if top else None,
            "packed_over_plain": round(f["packed"]["tokens_per_second"] / f["plain"]["tokens_per_second"], 3),
            "memory_formula_over_measured": memory["formula_over_measured"],
            "memory_within_promise": 1 - WITHIN <= memory["formula_over_measured"] <= 1 + WITHIN,
            **{
                f"{kind}_over_torch": round(f[kind]["tokens_per_second"] / twin[kind]["tokens_per_second"], 3)
                for kind in ("plain", "packed")
                if kind in twin and twin[kind]["rows"] == f["rows"]
            },
        }
    if "isolation" in figures:
        backends = figures["isolation"]["backends"]
        leaking = [name for name, value in backends.items() if value.get("leaks")]
        found["isolation"] = {"checked": len(backends), "leaking": leaking}
    return found


def show(found: dict[str, Any], done: dict[str, Any]) -> None:
    """For people."""
    for name, part in done.items():
        said = part.get("why", "") or (f"{part['seconds']:.0f} s" if "seconds" in part else "")
        print(f"{name:<16}{part['status']:<10}{said}")
    for name, values in found.items():
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value is not None)
        print(f"{name}: {words}")


def save(path: Path, device: dict[str, Any], done: dict[str, Any]) -> None:
    """Under its final name only when whole."""
    what = "all GPU benchmarks of one card; figures as each program writes them"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"what": what, **device, "verdicts": verdicts(done), "parts": done}, indent=1)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all parts together")
    parser.add_argument("--parts", default="", help="only these, comma-separated")
    parser.add_argument("--torch-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is done")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args(arguments)
    wanted = smoke_parts() if options.smoke else parts()
    if not options.smoke and not has_torch(options.torch_python):
        print(f"no PyTorch in {options.torch_python.name}: the twins are left out (--torch-python)")
        wanted = without_torch(wanted)
    chosen = set(filter(None, options.parts.split(",")))
    if unknown := chosen - {part.name for part in wanted}:
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in wanted)}")
    about = {"smoke": options.smoke, "versions": versions("jax", "jaxlib", "flax", "optax", "numpy", "torch")}
    done: dict[str, Any] = {}
    if options.out.is_file() and not options.fresh:
        before = json.loads(options.out.read_text())
        if {key: before[key] for key in about} == about:
            done = {name: part for name, part in before["parts"].items() if part["status"] == "done"}
    ends = time.monotonic() + options.budget
    for part in wanted:
        if (chosen and part.name not in chosen) or part.name in done:
            continue
        left = ends - time.monotonic()
        print(f"== {part.name}; {left:.0f} s left", flush=True)
        if left < LEAST:
            done[part.name] = {"status": "left out", "why": "no time left: run the same command again"}
        else:
            done[part.name] = run(part, min(part.limit, left), options.torch_python, done)
        save(options.out, about, done)
    show(verdicts(done), done)
    print(f"written to {options.out.name}")
    return 0 if all(part["status"] == "done" for part in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
