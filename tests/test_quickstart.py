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
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quickstart")]  # one worker: they share a run


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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Working directory and output of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("quickstart") / "a run, with spaces"
    return workdir, finish(start(workdir))


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


def test_every_stage_is_done_and_the_end_says_what_next(unbroken, monkeypatch):
    workdir, printed = unbroken
    monkeypatch.chdir(ROOT)
    names = [stage.name for stage in load_pipeline(PIPELINE).stages]
    assert names == ["corpus", "tokenizer", "pack", "pretrain", "evaluate", "sample", "report"]
    for number, name in enumerate(names, start=1):
        assert re.search(rf"^\[{number}/7\] {name}: done in ", printed, flags=re.MULTILINE)
    assert f"Report: {workdir}/report.html" in printed
    assert f"-m nanollama.chat '--checkpoint={workdir}/train'" in printed
    assert (workdir / "report.html").stat().st_size > 10_000
    assert results(workdir)


def test_a_second_run_does_nothing_and_is_quick(unbroken):
    workdir, _ = unbroken
    begin = time.monotonic()
    printed = finish(start(workdir))
    assert printed.count("done before") == 7
    assert time.monotonic() - begin < 10  # about 1 s on a quiet machine


@pytest.mark.skipif(sys.platform != "linux", reason="kill -9 of the runner alone ends its stages on Linux only")
def test_killed_while_training_it_ends_with_the_same_model_and_figures(unbroken, tmp_path):
    workdir, _ = unbroken
    broken = tmp_path / "killed"
    shutil.copytree(workdir, broken)
    for made in ("train", "evaluation", "samples"):
        shutil.rmtree(broken / made)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(broken)
        metrics = broken / "train" / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size == before):
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode != 0, "it ended before the signal: nothing was tested"
    finish(start(broken))
    assert final_checkpoint(broken) == final_checkpoint(workdir) != []
    assert results(broken) == results(workdir)
