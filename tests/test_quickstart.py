"""The quickstart's whole chain, shrunk to seconds: every stage, a second run, kills, and the same result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanollama.stages import load_pipeline

ROOT = Path(__file__).parents[1]
PIPELINE = "configs/pipelines/quickstart.py:tiny"
pytestmark = pytest.mark.slow


def start(workdir):
    command = [sys.executable, "-m", "nanollama.run", f"--pipeline={PIPELINE}", f"--workdir={workdir}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed[-3000:]
    return printed


def results(workdir):
    """The evaluation's figures, without times and paths."""
    values = json.loads((workdir / "evaluation" / "results.json").read_text())
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and "seconds" not in k}


def final_checkpoint(workdir):
    ran = subprocess.run(
        [sys.executable, "-m", "nanollama.training.checkpoint", "hash", str(workdir / "train")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return re.findall(r"\b[0-9a-f]{16,64}\b", ran.stdout)


def check_all_is_done_and_the_end_says_what_next(workdir, printed):
    names = [stage.name for stage in load_pipeline(PIPELINE).stages]
    assert names == ["corpus", "tokenizer", "pack", "pretrain", "evaluate", "sample", "report"]
    for number, name in enumerate(names, start=1):
        assert re.search(rf"^\[{number}/7\] {name}: done in ", printed, flags=re.MULTILINE)
    assert f"Report: {workdir}/report.html" in printed
    assert f"-m nanollama.chat '--checkpoint={workdir}/train'" in printed
    assert (workdir / "report.html").stat().st_size > 10_000
    assert results(workdir)


def kill_twice_while_training(workdir):
    """kill -9, then SIGTERM, each after the trainer wrote something new."""
    metrics = workdir / "train" / "metrics.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(workdir)
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size == before):
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode != 0, "it ended before the signal: nothing was tested"


@pytest.mark.skipif(sys.platform != "linux", reason="kill -9 of the runner alone ends its stages on Linux only")
def test_unbroken_again_and_killed(tmp_path, monkeypatch):
    """One test, so that it makes the data once whatever worker gets it."""
    monkeypatch.chdir(ROOT)
    workdir, killed = tmp_path / "a run, with spaces", tmp_path / "killed"
    check_all_is_done_and_the_end_says_what_next(workdir, finish(start(workdir)))
    assert finish(start(workdir)).count("done before") == 7

    shutil.copytree(workdir, killed)
    for made in ("train", "evaluation", "samples"):
        shutil.rmtree(killed / made)
    kill_twice_while_training(killed)
    printed = finish(start(killed))
    assert printed.count("done before") >= 3  # the data, though the folder is another one
    assert json.loads((killed / "stages" / "pretrain.json").read_text())["attempts"] >= 2
    assert final_checkpoint(killed) == final_checkpoint(workdir) != []
    assert results(killed) == results(workdir)
