"""metrics.jsonl never holds a step twice, what is written is strict JSON, sinks are optional."""

import io
import json
import math
import sys
import types
from pathlib import Path

import pytest

from nanollama.config import ConfigError, LoggingConfig
from nanollama.training import metrics
from nanollama.training.metrics import MetricsLog, read_metrics

QUIET = LoggingConfig(tensorboard=False, every=10)


def open_log(folder: Path, resume_step: int = 0, logging: LoggingConfig = QUIET, **keywords) -> MetricsLog:
    return MetricsLog(folder, logging, resume_step=resume_step, stream=io.StringIO(), **keywords)


def kill(log: MetricsLog) -> None:
    """What the kernel does to a killed run: its file is closed, nothing else happens."""
    log._file.close()


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.train(step, {"loss": 5.0 - step / 100}, {"tokens": step * 10})
        if step % 5 == 0:
            log.validation(step, {"nll": 4.0})


def check_each_step_once(path: Path, last: int) -> None:
    lines = [line for line in read_metrics(path) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    validations = [line["step"] for line in read_metrics(path) if line["kind"] == "validation"]
    assert validations == list(range(5, last + 1, 5))


@pytest.mark.parametrize(("killed_at", "resume_at"), [(17, 10), (13, 10), (10, 10), (9, 0), (20, 5)])
def test_no_step_twice_after_kill_and_resume(tmp_path, killed_at, resume_at):
    log = open_log(tmp_path)
    write_steps(log, 1, killed_at)
    kill(log)
    log = open_log(tmp_path, resume_at)
    if resume_at:
        log.validation(resume_at, {"nll": 4.0})  # evaluated again after the restore: same figures, one line
    write_steps(log, resume_at + 1, 20)
    log.close()
    check_each_step_once(tmp_path / "metrics.jsonl", 20)


def test_mutant_that_only_appends_is_caught(tmp_path, monkeypatch):
    with open_log(tmp_path) as log:
        write_steps(log, 1, 17)
    monkeypatch.setattr(metrics, "_truncate", lambda path, step: [])
    monkeypatch.setattr(MetricsLog, "_write", _write_always)
    with open_log(tmp_path, 10) as log:
        write_steps(log, 11, 20)
    with pytest.raises(AssertionError):
        check_each_step_once(tmp_path / "metrics.jsonl", 20)


def _write_always(self, step, kind, figures):
    self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
    self._file.flush()
    return True


def test_what_the_killed_run_said_is_kept_in_the_resume_event(tmp_path):
    with open_log(tmp_path) as log:
        write_steps(log, 1, 12)
        log.event(12, "loss is not finite", event="not_finite")
    open_log(tmp_path, 10).close()
    (event,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "event"]
    assert event["step"] == 10 and event["event"] == "resumed"
    assert event["earlier_events"] == ["step 12: loss is not finite"]
    assert "3 lines" in event["text"] and "step 12" in event["text"]


def test_a_line_cut_off_by_a_kill_is_left_out_and_removed_on_resume(tmp_path):
    with open_log(tmp_path) as log:
        write_steps(log, 1, 4)
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "kind": "tr\xff')
    assert len(read_metrics(path)) == 4
    with open_log(tmp_path, 4) as log:
        write_steps(log, 5, 5)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    check_each_step_once(path, 5)


def test_every_line_is_strict_json_and_reads_back(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss": math.nan, "grad_norm": math.inf}, {"tokens": 3, "epochs": {"a/\u2028ü": 0.5}})
        log.event(1, "nan")

    def refuse(name):
        raise ValueError(name)

    raw = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line, parse_constant=refuse)["step"] for line in raw] == [1, 1]
    train, event = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(train["loss"]) and train["grad_norm"] == math.inf
    assert train["epochs"] == {"a/\u2028ü": 0.5}
    assert event["text"] == "nan"  # a text stays a text


def test_console_lines_say_what_a_person_needs(tmp_path):
    log = open_log(tmp_path, steps=1000, convention="MFU counts this.")
    log.train(20, {"loss": 3.25, "learning_rate": 3e-4, "grad_norm": 0.5},
              {"tokens_per_second": 12345.6, "mfu": 0.4123, "eta_seconds": 200.0, "memory_bytes": 2**30,
               "epochs": {"a": 0.25, "b": 1.5}})
    log.validation(20, {"nll": 3.0, "perplexity": 20.0855, "bits_per_byte": 1.2345,
                        "sources": {"a": {"bits_per_byte": 1.1}, "b": {"bits_per_byte": 1.3}}})
    log.close()
    lines = log._stream.getvalue().splitlines()
    assert lines == [
        "MFU counts this.",
        ("step   20/1000  loss 3.2500  lr 3.00e-04  grad 0.500  tok/s 12,346  MFU 41.2%  "
         "epochs 0.25 to 1.50  ETA 3 min 20 s  mem 1.00 GiB"),
        ("validation at step 20  nll 3.0000  perplexity 20.085  bits/byte 1.2345  "
         "(bits/byte by source: a 1.1000, b 1.3000)")]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["event"] == "convention"
    assert [step for step in range(25) if log.due(step)] == [0, 1, 10, 20] and log.due(1000)


def test_tensorboard_is_written_and_hides_steps_after_the_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    logging = LoggingConfig(tensorboard=True)
    log = open_log(tmp_path, logging=logging)
    log.train(1, {"loss": 2.0}, {"epochs": {"set/a": 0.5}})
    log.close()
    log = open_log(tmp_path, 1, logging=logging)
    log.train(2, {"loss": 1.5}, {})
    log.close()
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert b"train/loss" in content and b"train/epochs/set/a" in content
    assert "tensorflow" not in sys.modules


def test_missing_package_names_its_extra_and_changes_nothing(tmp_path, monkeypatch):
    with open_log(tmp_path) as log:
        write_steps(log, 1, 8)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"nanollama\[wandb\]"):
        open_log(tmp_path, 5, LoggingConfig(tensorboard=False, wandb_project="p"))
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="tensorboardX"):
        open_log(tmp_path, 5, LoggingConfig())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_wandb_goes_on_in_the_same_run_after_a_resume(tmp_path, monkeypatch):
    opened, logged = [], []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: opened.append(k) or run))
    logging = LoggingConfig(tensorboard=False, wandb_project="p")
    for resume_step in (0, 1):
        log = open_log(tmp_path, resume_step, logging)
        log.train(resume_step + 1, {"loss": 2.0}, {})
        log.close()
    assert opened[0]["id"] == opened[1]["id"] and opened[1]["resume"] == "allow"
    assert logged == [{"train/loss": 2.0, "step": 1}, {"train/loss": 2.0, "step": 2}]
