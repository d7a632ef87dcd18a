"""All benchmarks of one GPU in one command of under ten minutes. Needs jax, flax, optax, numpy and einops only.

    python benchmarks/gpu_all.py                       # -> results/gpu.json, written after every part
    python benchmarks/gpu_all.py --torch-python=PYTHON # default: this Python; without torch the twins are left out
    python benchmarks/gpu_all.py --parts=ceilings,isolation
    python benchmarks/gpu_all.py --smoke --out=FILE    # tiny sizes on any device: tries the program, not the speed

Parts, in order of worth: the card's ceilings; attention (tiles tuned for the models that follow); training beside
torch.compile, plain and packed, and the plan's memory formula beside what was used; packing isolation; long packed
rows. Time is kept for each of these, and the kept times fit the budget together: a part may use what the ones before it
left over, but not what is kept for those after it. What a part had measured when it was stopped is in the file, and it
is tried again when the others are through, with the programs it had compiled. Then come the other parts as far as time
goes: more models, generation beside transformers, the whole attention table.

Each part is a process of its own: one that fails costs its part and no more. What is done is not done again: run the
same command once more for the rest; `--fresh` begins anew. Measured tiles go to the cache folder that training reads
($XDG_CACHE_HOME or ~/.cache).
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

from benchmarks import gpu_verdicts
from benchmarks.machine import RESULTS, versions
from nanollama.data.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent

BUDGET = 570  # seconds of everything together
LEAST = 15  # seconds: with less left no part is begun
MOST = 200  # seconds that a part may take, however much is left
TORCH = "{torch}"  # in a command: the Python that has PyTorch


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of benchmarks/ and what it is given."""

    name: str
    kept: int  # seconds that no part before it may use; 0: it has what the others leave
    command: tuple[str, ...]  # a program and its arguments; --out is added
    after: str = ""  # a train part whose rows the twin takes, as --rows


def parts() -> list[Part]:
    """For one GPU, from what is wanted most."""
    return [
        Part("ceilings", 25, ("ceilings.py",)),
        # Heads as in nanollama-1b (8 query heads a KV head) and llama-7b, so that training finds these tiles.
        Part("attention 64", 95, ("attention.py", "--tune", "--lengths=4096", "--head-dims=64", "--group=8")),
        Part("train 1b", 85, ("train_gpu.py", "--case=1b")),
        Part("torch 1b", 100, ("train_gpu.py", "--case=1b", f"--peer-python={TORCH}"), "train 1b"),
        Part("isolation", 35, ("isolation.py",)),
        Part("attention 128", 80, ("attention.py", "--tune", "--lengths=4096", "--head-dims=128")),
        Part("train 7b", 70, ("train_gpu.py", "--case=7b")),
        Part("train 23m", 35, ("train_gpu.py", "--case=23m")),
        Part("attention long", 35, ("attention.py", "--lengths=16384", "--head-dims=64,128", "--rows=packed")),
        Part("train 125m", 0, ("train_gpu.py", "--case=125m")),
        Part("torch 125m", 0, ("train_gpu.py", "--case=125m", f"--peer-python={TORCH}"), "train 125m"),
        Part("decode", 0, ("decode.py", "--model=nanollama-1b", "--dtype=bfloat16", "--batches=1,16",
                           f"--peer-python={TORCH}")),
        Part("train 1b tuned", 0, ("train_gpu.py", "--case=1b", "--autotune")),
        Part("train 1b-full", 0, ("train_gpu.py", "--case=1b-full")),
        Part("attention all", 0, ("attention.py", "--lengths=1024,4096,16384")),
    ]  # fmt: skip


def smoke_parts() -> list[Part]:
    """The same programs, so small that any device runs them in seconds."""
    return [
        Part("ceilings", 100, ("ceilings.py", "--size=64", "--copy-mb=1")),
        Part("attention 64", 100, ("attention.py", "--interpret", "--lengths=32", "--head-dims=16", "--rows=packed",
                                   "--repeats=1")),
        Part("train tiny", 100, ("train_gpu.py", "--case=tiny", "--dtype=float32")),
        Part("isolation", 100, ("isolation.py", "--length=32", "--head-dims=16", "--backends=auto,cudnn")),
        Part("decode", 0, ("decode.py", "--model=tiny", "--batches=2", "--prompt=16", "--tokens=4", "--rounds=1")),
    ]


def order(wanted: list[Part]) -> list[tuple[Part, int]]:
    """Each part and the seconds kept for others: those that have some, these again if stopped, and the rest."""
    first = [part for part in wanted if part.kept]
    others = [sum(later.kept for later in first[number + 1 :]) for number in range(len(first))]
    again = [(part, 0) for part in [*first, *(part for part in wanted if not part.kept)]]
    return [*zip(first, others, strict=True), *again]


def allowed(part: Part, others: float, left: float) -> float:
    """Seconds that a part may take, of those that are left, where some are kept for others."""
    return min(MOST, left, max(part.kept, left - others))


def run(part: Part, limit: float, torch: Path, given: dict[str, Any]) -> dict[str, Any]:
    """{status: done, failed, stopped or left out; seconds; figures; why}. What the part prints is passed on.

    figures: all that the part wrote, which is not all it would have where it is not done.
    """
    program, *arguments = (word.replace(TORCH, str(torch)) for word in part.command)
    if part.after:
        rows = given.get(part.after, {}).get("figures", {}).get("rows")
        if not rows:
            return {"status": "left out", "why": f"{part.after!r} has no figures to stand beside"}
        arguments.append(f"--rows={rows}")
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
        result = {"status": "stopped" if status is None else "failed" if status else "done",
                  "seconds": round(time.monotonic() - started, 1), "command": [program, *part.command[1:]]}  # fmt: skip
        if out.is_file():
            result["figures"] = json.loads(out.read_text())
        if status != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = (lines or [f"status {status}"])[-1][:300]
            result["why"] = f"stopped after {limit:.0f} s" if status is None else last
        return result


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a part's whole process group; nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def surroundings() -> dict[str, str]:
    """JAX takes the memory that a whole run would; one cache of compiled programs for all parts and calls."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanollama" / "jax"
    set_here = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }  # fmt: skip
    return {**set_here, **os.environ}


def without_torch(wanted: list[Part]) -> list[Part]:
    """The parts that are left where there is no PyTorch: ours alone."""
    alone = [part for part in wanted if not part.after]
    return [
        dataclasses.replace(part, command=tuple(word for word in part.command if TORCH not in word)) for part in alone
    ]


def has_torch(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0


def save(path: Path, about: dict[str, Any], done: dict[str, Any]) -> None:
    """Under its final name only when whole."""
    what = "all GPU benchmarks of one card; figures as each program writes them"
    found = {"goals": gpu_verdicts.goals(done), "verdicts": gpu_verdicts.verdicts(done)}
    write_atomic(path, json.dumps({"what": what, **about, **found, "parts": done}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all parts together")
    parser.add_argument("--parts", default="", help="only these, comma-separated")
    parser.add_argument("--torch-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever is done")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.budget
    wanted = smoke_parts() if options.smoke else parts()
    if not options.smoke and not has_torch(options.torch_python):
        print(f"no PyTorch in {options.torch_python.name}: the twins are left out (--torch-python)")
        wanted = without_torch(wanted)
    names, chosen = [part.name for part in wanted], set(filter(None, options.parts.split(",")))
    if unknown := chosen.difference(names):
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    about = {"smoke": options.smoke, "versions": versions("jax", "jaxlib", "flax", "optax", "numpy", "torch")}
    done: dict[str, Any] = {}
    if options.out.is_file() and not options.fresh:
        before = json.loads(options.out.read_text())
        if {key: before[key] for key in about} == about:
            done = before["parts"]
    tried = {name for name, part in done.items() if part["status"] == "done"}
    for part, others in order([part for part in wanted if part.name not in tried and part.name in (chosen or names)]):
        if part.name in tried and done[part.name]["status"] != "stopped":
            continue
        left, before = ends - time.monotonic(), done.get(part.name, {})
        if left >= LEAST:
            limit = allowed(part, others, left)
            print(f"== {part.name}: up to {limit:.0f} of the {left:.0f} s left", flush=True)
            done[part.name] = run(part, limit, options.torch_python, done)
            if "figures" in before:  # of the time it was stopped at, where it got less far now
                done[part.name].setdefault("figures", before["figures"])
        elif not before:
            done[part.name] = {"status": "left out", "why": "no time was left"}
        tried.add(part.name)
        save(options.out, about, done)
    print(gpu_verdicts.text(done))
    print(f"written to {options.out.name}")
    if unfinished := [name for name, part in done.items() if part["status"] != "done"]:
        print(f"not done: {', '.join(unfinished)}. The same command goes on with them.")
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
