"""Kills the corpus command at random moments and compares: `python tests/kill_corpus.py MIX.yaml FOLDER --kills=10`.

A slow check for large mixtures, by hand; the test suite has a small one (tests/test_corpus_stages.py). FOLDER/killed is
killed with SIGKILL, workers and all, after random times, then finished; FOLDER/whole is made without a kill, unless it
is there. Every file of the two must be equal. A kill that comes when nothing has been added since the last one is told,
for it tests nothing new.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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
    shutil.rmtree(killed, ignore_errors=True)
    rng, done, before = random.Random(options.seed), 0, -1
    while done < options.kills:
        process = start(options.mixture, killed, options.workers)
        wait = rng.uniform(*options.seconds)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too: nothing is left to clean up
            process.wait()
            done += 1
            now = sum(1 for path in killed.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
            print(f"kill {done} after {wait:.1f} s: {now} files{' (nothing new)' if now == before else ''}", flush=True)
            before = now
        else:
            assert process.returncode == 0, process.returncode
            print(f"finished within {wait:.1f} s, after {done} kills; once more from nothing", flush=True)
            shutil.rmtree(killed)
    began = time.monotonic()
    assert start(options.mixture, killed, options.workers).wait() == 0
    print(f"finished in {time.monotonic() - began:.1f} s", flush=True)
    if not (whole / "manifest.json").exists():
        assert start(options.mixture, whole, options.workers).wait() == 0
    one, other = files(whole), files(killed)
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    print(f"{len(one)} files, {len(different)} different: {different[:5]}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
