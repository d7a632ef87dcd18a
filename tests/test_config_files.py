"""Config files and what the command line changes in them: read as they are meant, refused by name."""

from pathlib import Path

import pytest

from nanollama.config import ConfigError
from nanollama.config_files import load, load_file, overrides, parse_arg

FILE = """
from nanollama.config_files import parse_arg
def get_config(argument):
    steps = parse_arg(argument, steps=10, small=False)["steps"]
    return {"name": "tiny", "steps": steps, "batch": {"global_rows": 8},
            "data": {"sets": ({"path": "absent"},), "tokenizer": "absent", "sequence_length": 32},
            "model": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
                          num_kv_heads=2, head_dim=8)}
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(FILE)
    return str(tmp_path / "tiny.py")


def test_argument_and_changes_reach_the_config(spec: str) -> None:
    assert load(spec).steps == 10
    changed = load(f"{spec}:steps=20", ["optimizer.learning_rate=1e-2", "logging.sample_prompts=('a', 'b')",
                                        "optimizer.name=muon", "lora.rank=4", "initial_checkpoint=runs/base"])
    assert (changed.steps, changed.optimizer.learning_rate, changed.optimizer.name) == (20, 0.01, "muon")
    assert changed.logging.sample_prompts == ("a", "b") and changed.lora is not None and changed.lora.rank == 4


@pytest.mark.parametrize(("change", "message"), [
    ("steps", "--config.steps: has no value"),
    ("steps=ten", "config.steps: 'ten' is of type str"),
    ("stepps=3", "config.stepps"),
    ("steps.first=3", "config.steps: has no fields of its own"),
])
def test_a_change_is_refused_by_field(spec: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(spec, [change])
    assert message in str(refused.value)


def test_files_that_are_none(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"no file '.*tinny\.py'.*tiny\.py"):
        load_file(spec.replace("tiny.py", "tinny.py"))
    Path(spec).write_text("steps = 3\n")
    with pytest.raises(ConfigError, match=r"has no get_config\(arg\)"):
        load_file(spec)


def test_arguments_of_a_file() -> None:
    assert parse_arg("", steps=10, local=False) == {"steps": 10, "local": False}
    assert parse_arg("local,steps=20", steps=10, local=False) == {"steps": 20, "local": True}
    with pytest.raises(ConfigError, match=r"unknown argument 'lokal'.*local"):
        parse_arg("lokal", local=False)
    with pytest.raises(ConfigError, match=r"argument steps='many' is of type str"):
        parse_arg("steps=many", steps=10)


def test_only_fields_are_taken_for_changes() -> None:
    assert overrides(["--config.steps=3", "--config.a.b=c"]) == ["steps=3", "a.b=c"]
    with pytest.raises(ConfigError, match=r"--steps=3: no such argument"):
        overrides(["--steps=3"])
