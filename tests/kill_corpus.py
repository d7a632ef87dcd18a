"""Kills the corpus command at random moments and compares: `python tests/kill_corpus.py MIX.yaml FOLDER --kills=10`.

A slow check for large mixtures, by hand; the test suite has a small one (tests/test_corpus_stages.py). FOLDER/whole is
made without a kill, unless it is there. FOLDER/killed is killed with SIGKILL, workers and all, after random times, and
started again; whenever it ends, every file of the two must be equal, and it begins anew until there were enough kills.
A kill that comes when nothing has been added since the last one is told, for it tests nothing new.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path


def start(mixture: str, output: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "data_pipeline.corpus", f"--config={mixture}", f"--output={output}",
               f"--workers={workers}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mixture")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, nargs=2, default=(20.0, 120.0), help="least and most time to a kill")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    whole, killed = options.folder / "whole", options.folder / "killed"
    if not (whole / "manifest.json").exists():
        assert start(options.mixture, whole, options.workers).wait() == 0
    wanted = files(whole)
    rng, kills, before = random.Random(options.seed), 0, -1
    shutil.rmtree(killed, ignore_errors=True)
    while kills < options.kills or killed.exists():
        process = start(options.mixture, killed, options.workers)
        wait = rng.uniform(*options.seconds)
        try:
            process.wait(timeout=wait if kills < options.kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too: nothing is left to clean up
            process.wait()
            kills += 1
            now = sum(1 for path in killed.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
            new = " (nothing new)" if now == before else ""
            print(f"kill {kills} after {wait:.1f} s: {now} files{new}", flush=True)
            before = now
        else:
            assert process.returncode == 0, process.returncode
            found = files(killed)
            different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            print(f"finished after {kills} kills: {len(found)} files, {len(different)} different: {different[:5]}",
                  flush=True)
            if different:
                sys.exit(1)
            shutil.rmtree(killed)


if __name__ == "__main__":
    main()
