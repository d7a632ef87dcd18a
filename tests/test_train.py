"""The front door end to end: bits after kills, refusals, stops. Whole processes where a process must die."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from packed_sets import make_packed_set, make_tokenizer

from nanollama import train as front_door
from nanollama.config import Config, MeshConfig, resolve
from nanollama.data.files import DataError, Lock
from nanollama.parallel.mesh import make_mesh, mesh_sizes
from nanollama.parallel.team import Team
from nanollama.planning import here, knobs, memory
from nanollama.training.checkpoint import restore_params, tree_hash
from nanollama.training.metrics import read_metrics
from nanollama.training.watch import NotFinite

ROOT = Path(__file__).parents[1]
STEPS = 12


def settings(folder: Path, **changes: object) -> dict:
    """Fields of a run small enough to take seconds, as a config file would return them."""
    fields: dict = {
        "name": "tiny",
        "steps": STEPS,
        "model": dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
                      num_kv_heads=2, head_dim=8, tie_embeddings=True),
        "data": dict(sets=[dict(path=str(folder / "packed"))], tokenizer=str(folder / "tokenizer"), sequence_length=64),
        "batch": dict(global_rows=8, micro_batches=8),
        "schedule": dict(name="constant", warmup_steps=2),
        "optimizer": dict(learning_rate=3e-3),
        "mesh": dict(data=1),
        "checkpoint": dict(every=3, keep=2),
        "evaluation": dict(every=6),
        "logging": dict(every=1, tensorboard=False, sample_tokens=4, sample_prompts=["the loader"]),
    }
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    return fields


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(folder / "tokenizer", 400)
    make_packed_set(folder / "packed", tokenizer=tokenizer, record_length=64, documents=300, seed=0)
    return folder


def test_micro_batches_fit_the_memory_and_stay_when_the_run_goes_on(data, tmp_path, monkeypatch, capsys):
    fields = settings(data, steps=1, batch=dict(micro_batches=0), schedule=dict(warmup_steps=0),
                      evaluation=dict(every=0))
    sizes = mesh_sizes(MeshConfig(), 1)
    half = resolve(fields | {"batch": dict(global_rows=8, micro_batches=2)})
    needed = memory.estimate(half, sizes, kernel=False).total
    monkeypatch.setattr(here, "device_memory", lambda count: knobs.MARGIN * needed)
    assert front_door.train(resolve(fields), tmp_path / "run")
    assert "micro-batches: 2, the fewest that fit" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["batch"]["micro_batches"] == 2
    monkeypatch.setattr(here, "device_memory", lambda count: 10 * knobs.MARGIN * needed)

    def chosen(folder: str) -> int:
        fitted = front_door.fitted(resolve(fields), tmp_path / folder, make_mesh(MeshConfig()), Team())
        return fitted.batch.micro_batches

    assert chosen("run") == 2, "it rounds as before"
    assert chosen("other") == 1


@pytest.fixture
def small(data: Path) -> Config:
    return resolve(settings(data))


def command(folder: Path, fields: dict, *arguments: str) -> list[str]:
    file = folder / "config.py"
    file.write_text(f"def get_config(arg):\n    return {fields!r}\n")
    return [sys.executable, "-m", "nanollama.train", f"--config={file}", f"--workdir={folder / 'run'}", *arguments]


def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return subprocess.run(*args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload]


def start(argv: list[str]) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has logged `step`."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None or any(line["step"] >= step for line in read_metrics(workdir / "metrics.jsonl")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in 300 s")


def run_hash(workdir: Path) -> str:
    """The bits of the newest checkpoint, as the user's command prints them."""
    done = run([sys.executable, "-m", "nanollama.training.checkpoint", "hash", str(workdir)])
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"}


@pytest.mark.slow
def test_killed_and_resumed_is_the_unbroken_run_bit_for_bit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    slow = settings(data, steps=24, checkpoint=dict(every=4), evaluation=dict(every=12), model=dict(num_layers=1))
    done = run(command(whole, slow))
    assert done.returncode == 0, done.stderr
    for step in sorted(random.Random(0).sample(range(2, 22), 2)):
        process = start(command(broken, slow, "--resume"))
        wait_for_step(broken / "run", step, process)
        process.kill()
        process.wait()
    done = run(command(broken, slow, "--resume"))
    assert done.returncode == 0, done.stderr
    assert run_hash(broken / "run") == run_hash(whole / "run")
    assert losses(broken / "run") == losses(whole / "run"), "every step once, with the same loss"
    assert list(losses(whole / "run")) == list(range(1, 25))
    finals = [json.loads((folder / "run" / "results.json").read_text()) for folder in (whole, broken)]
    assert finals[0] == finals[1]
    assert front_door.main(command(broken, slow, "--resume")[3:]) == 0
    assert "done at step 24" in capsys.readouterr().out


@pytest.mark.slow
def test_elastic_has_the_same_bits_on_any_devices_with_changes_between(data: Path, tmp_path: Path) -> None:
    """One device in this process; eight and then two in processes of their own. All counts are in test_elastic."""

    def fields(steps: int) -> dict:
        return settings(data, determinism="elastic", steps=steps, mesh=dict(data=-1), model=dict(num_layers=1),
                        evaluation=dict(every=0), logging=dict(sample_prompts=[]))  # fmt: skip

    one, many = tmp_path / "one", tmp_path / "many"
    many.mkdir()
    front_door.train(resolve({**fields(STEPS), "mesh": dict(data=1)}), one / "run")
    for devices, steps in ((8, 6), (2, STEPS)):
        done = run(command(many, fields(steps), "--resume", f"--devices={devices}"))
        assert done.returncode == 0, done.stderr
    assert run_hash(one / "run") == run_hash(many / "run")
    assert losses(one / "run") == losses(many / "run")


def test_sigterm_saves_and_exits_0(data: Path, tmp_path: Path) -> None:
    fields = settings(data, steps=100_000, checkpoint=dict(every=100_000))
    process = start(command(tmp_path, fields))
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    saved = max(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir() if folder.name.isdigit())
    assert saved == max(line["step"] for line in lines if line["kind"] == "train")
    assert any(line.get("event") == "stopped" for line in lines)


def test_two_runs_are_equal_and_learn(small: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert front_door.train(small, tmp_path / name)
    first, second = (restore_params(tmp_path / name)[0] for name in ("a", "b"))
    assert tree_hash(first) == tree_hash(second)
    lines = losses(tmp_path / "a")
    assert lines == losses(tmp_path / "b")
    assert lines[STEPS] < lines[1] - 0.1


def test_account_of_tokens_is_that_of_the_batches(small: Config, tmp_path: Path) -> None:
    front_door.train(small, tmp_path / "run")
    line = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"][-1]
    loader = front_door.Loader(front_door.open_mixture(small.data), seed=0, global_batch=8)
    expected = np.sum([loader.batch(step).source_tokens for step in range(STEPS)], axis=0)
    assert list(line["source_tokens"].values()) == expected.tolist()
    assert line["tokens"] == expected.sum()


def test_not_finite_stops_before_it_is_saved(data: Path, tmp_path: Path) -> None:
    wild = resolve(settings(data, optimizer=dict(learning_rate=1e15, clip_norm=0.0), checkpoint=dict(every=1)))
    with pytest.raises(NotFinite, match=r"step \d+ is not finite: .*--resume"):
        front_door.train(wild, tmp_path / "run")
    params, _ = restore_params(tmp_path / "run")
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params))
    assert any(line.get("event") == "not_finite" for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_damaged_checkpoint_is_skipped_by_name(
    small: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    front_door.train(small, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    expected = losses(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert front_door.train(small, tmp_path / "run", resume=True)
    assert any(str(newest) in record.getMessage() for record in caplog.records)
    assert losses(tmp_path / "run") == expected


def test_going_on_must_be_asked_for(small: Config, tmp_path: Path) -> None:
    front_door.train(small, tmp_path / "run")
    with pytest.raises(DataError, match="--resume"):
        front_door.train(small, tmp_path / "run")


def test_one_run_per_folder(small: Config, tmp_path: Path) -> None:
    with Lock(tmp_path / "run"), pytest.raises(DataError, match="in use by process"):
        front_door.train(small, tmp_path / "run")


def test_another_model_or_data_is_refused_on_resume(small: Config, data: Path, tmp_path: Path) -> None:
    front_door.train(small, tmp_path / "run")
    with pytest.raises(DataError, match=r"model\.num_layers"):
        front_door.train(resolve(settings(data, steps=20, model=dict(num_layers=1))), tmp_path / "run", resume=True)
    with pytest.raises(DataError, match="seed"):
        front_door.train(resolve(settings(data, steps=20, seed=1)), tmp_path / "run", resume=True)


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.optimzer.eps=1", "config.optimzer: no such field. Did you mean 'optimizer'?"),
    ("--config.steps=ten", "config.steps: 'ten' is of type str"),
    ("--config.model.num_kv_heads=3", "config.model.num_kv_heads: 3 does not divide num_heads=4"),
    ("--config.mesh.data=64", "needs 64 devices"),
    ("--config.mesh.tensor=3", "config.mesh"),
    ("--config.batch.global_rows=9", "config.batch.micro_batches"),
    ("--config.data.sequence_length=100", "config.data.sequence_length: 100 is not a multiple of 64"),
    ("--config.model.vocab_size=100", "config.model.vocab_size: 100 is less than"),
    ("--config.data.tokenizer=nowhere", "python -m data_pipeline.tokenizer"),
    ("--stpes=3", "--stpes=3: no such argument"),
])
def test_bad_input_stops_before_any_work(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argument: str,
                                         message: str) -> None:
    status = front_door.main(command(tmp_path, settings(data), argument)[3:])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_get_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fields = settings(data)
    fields["data"]["sets"][0] = dict(path=str(tmp_path / "absent"), recipe="configs/mixtures/phase1.yaml")
    assert front_door.main(command(tmp_path, fields)[3:]) == 2
    error = capsys.readouterr().err
    assert "python -m data_pipeline.corpus --config=configs/mixtures/phase1.yaml" in error
    assert "python -m data_pipeline.pack" in error


def test_another_tokenizer_is_refused_with_both_hashes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", 380)
    mine = json.loads((data / "tokenizer" / "manifest.json").read_text())["sha256"]
    fields = settings(data, data=dict(tokenizer=str(tmp_path / "tokenizer")))
    assert front_door.main(command(tmp_path, fields)[3:]) == 2
    error = capsys.readouterr().err
    assert other.sha256 in error
    assert mine in error


def test_run_folder_can_move(small: Config, tmp_path: Path) -> None:
    front_door.train(small, tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert front_door.train(small, tmp_path / "elsewhere", resume=True)
