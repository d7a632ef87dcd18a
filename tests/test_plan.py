"""The plan: targets, the memory formula against real compilers, the knobs, the check before training."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from tiny import Training, tiny_config

from nanollama import config as configs
from nanollama import plan
from nanollama.config import ComputeConfig, ConfigError, MeshConfig
from nanollama.data.strict import FieldError
from nanollama.parallel.mesh import make_mesh, mesh_sizes
from nanollama.planning import aot, here, knobs, memory, targets
from nanollama.planning.targets import GIB

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "count", "topology"), [
    ("h200", 1, "1x1x1"), ("h200x2", 2, "1x1x2"), ("h100x64", 64, "8x1x8"), ("v5p-256", 256, "v5p:4x8x8"),
    ("V5E-16", 16, "v5e:4x4"),
])  # fmt: skip
def test_targets_are_named(name, count, topology):
    target = targets.parse(name)
    assert (target.count, target.topology) == (count, topology)


@pytest.mark.parametrize(("name", "message"), [
    ("h300x8", "no device 'h300'"), ("v5e-3", "There are 1, 4, 8, 16"), ("h100x12", "multiple of 8"),
    ("big one", "no device 'big one'"), ("h100x0", "0 devices"),
])  # fmt: skip
def test_unknown_targets_are_refused_by_name(name, message):
    with pytest.raises(FieldError, match=message):
        targets.parse(name)


def test_state_bytes_are_those_on_a_device():
    config = tiny_config(rows=16)
    for mesh in (MeshConfig(2, 2, 2), MeshConfig(1, 4, 2)):
        state = Training(config, mesh).state
        real = [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(part))
                for part in (state.params, state.opt_state)]  # fmt: skip
        assert memory.state_bytes(config, mesh_sizes(mesh, 8)) == tuple(real)


# What XLA's CUDA and TPU compilers said (jax 0.12.0.1, layers scanned, attention as a flash kernel); GiB of
# arguments and temporaries. docs/decisions.md has the table with the formula's figures beside them.
COMPILED = [
    ("configs/phase1.py", "h200x1", {"batch.micro_batches": 16, "compute.remat": "none"}, 12.30, 53.86),
    ("configs/phase1.py", "h200x1", {"batch.micro_batches": 16}, 12.30, 34.08),
    ("configs/phase1.py", "h200x1", {"batch.micro_batches": 16, "compute.remat": "full"}, 12.30, 13.38),
    ("configs/phase1.py", "h200x2", {"batch.micro_batches": 4}, 6.15, 57.19),
    ("configs/phase1.py", "h100x2", {"batch.micro_batches": 8, "compute.remat": "full"}, 6.15, 10.69),
    ("configs/pretrain_7b.py", "h100x8", {"batch.micro_batches": 16}, 9.42, 11.43),
]


@pytest.mark.parametrize(("spec", "target", "changes", "arguments", "temporaries"), COMPILED)
def test_formula_is_near_what_compilers_said(spec, target, changes, arguments, temporaries):
    config = configs.load(str(ROOT / spec), [f"{name}={value}" for name, value in changes.items()])
    found = knobs.evaluate(config, targets.parse(target)).memory
    assert found.arguments / GIB == pytest.approx(arguments, rel=0.01)
    assert found.total / GIB == pytest.approx(arguments + temporaries, rel=0.15)


def test_formula_reacts_to_every_knob():
    config = tiny_config(rows=16)
    sizes = mesh_sizes(MeshConfig(1, 1, 1), 1)
    whole = memory.estimate(config, sizes)
    remat = dataclasses.replace(config, compute=ComputeConfig(remat="full", loss_chunk_tokens=128))
    cut = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batches=4))
    assert memory.estimate(remat, sizes).activations < whole.activations / 2
    assert memory.estimate(cut, sizes).activations < whole.activations / 2
    sharded = memory.estimate(config, mesh_sizes(MeshConfig(1, 4, 2), 8))
    assert sharded.parameters < whole.parameters / 4 and sharded.activations < whole.activations / 3


@pytest.mark.parametrize("target", ["v5e-4", "h200x2"])
def test_compiled_for_a_machine_that_is_not_here(target):
    """Minutes of laptop time at 7B; here a model of two layers, whose collectives must be those of its layout."""
    where = targets.parse(target)
    if absent := aot.missing(where):
        pytest.skip(absent)
    config = tiny_config(rows=8, compute=ComputeConfig(scan_unroll=1, dtype="bfloat16", loss_chunk_tokens=128))
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=-1))
    compiled = aot.compile_step(config, where)
    sizes = mesh_sizes(config.mesh, where.count)
    assert sum(memory.state_bytes(config, sizes)) <= compiled.arguments <= 2 * sum(memory.state_bytes(config, sizes))
    assert compiled.aliased > 0.9 * sum(memory.state_bytes(config, sizes))
    assert compiled.temporaries > 0
    assert {"all-gather", "all-reduce", "reduce-scatter"} & set(compiled.collectives)


def test_command_line(capsys, tmp_path):
    command = [f"--config={ROOT / 'configs/phase1.py'}", "--target=h200x1", "--compile=no"]
    assert plan.main(command) == 1
    *text, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert not figures["fits"] and figures["parameters"] == 1_100_048_384
    assert any(line.startswith("fits       NO") for line in text)
    best = figures["options"][0]
    assert best["total"] <= figures["target"]["memory"] and best["overrides"]
    assert plan.main([*command, *best["overrides"], f"--json={tmp_path / 'plan.json'}"]) == 0, "its own advice fits"
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] and 0.3 < figures["run"]["mfu"] < 0.66
    assert figures["run"]["dollars"] == pytest.approx(figures["run"]["days"] * 24 * 3.8)


@pytest.mark.parametrize(("argument", "message"), [
    ("--target=h300x8", "Did you mean 'h200'?"),
    ("--config.mesh.tensor=3", "config.mesh"),
    ("--config.batch.micro_batches=3", "config.batch.micro_batches"),
    ("--compile=yes", "nanollama[cuda-plan]"),
])  # fmt: skip
def test_bad_input_is_refused(capsys, monkeypatch, argument, message):
    monkeypatch.setattr(aot, "missing", lambda target: 'pip install "nanollama[cuda-plan]"')
    assert plan.main([f"--config={ROOT / 'configs/phase1.py'}", "--target=h200x2", argument]) == 2
    assert message in capsys.readouterr().err


def test_shardings_are_a_table(capsys):
    command = [f"--config={ROOT / 'configs/phase1.py'}", "--target=h100x8", "--config.mesh.tensor=4", "--shardings"]
    assert plan.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fsdp 2" in lines[0] and "tensor 4" in lines[0]
    gate = next(line for line in lines if line.startswith("layers/gate "))
    assert gate.split("  ")[0] == "layers/gate" and "dim 1" in gate and "dim 2" in gate


def test_the_check_before_training(monkeypatch):
    config = tiny_config(rows=16)
    kept = memory.kept_bytes.cache_info().misses
    assert here.check_memory(config, 1) == ""
    assert memory.kept_bytes.cache_info().misses == kept, "nothing is traced for a run that is far from the limit"
    needed = memory.estimate(config, mesh_sizes(config.mesh, 1), kernel=False).total
    monkeypatch.setattr(here, "device_memory", lambda count: needed / 1.1)
    assert here.check_memory(config, 1).startswith("warning: tiny needs about")
    monkeypatch.setattr(here, "device_memory", lambda count: needed / 2)
    with pytest.raises(ConfigError, match=r"largest parts: \w+ .* GiB, \w+ .* GiB, \w+ .* GiB\. This fits: --config\."):
        here.check_memory(config, 1)
    monkeypatch.setattr(here, "device_memory", lambda count: 1000.0)
    with pytest.raises(ConfigError, match="use more devices, or a smaller model"):
        here.check_memory(config, 1)


def test_out_of_memory_names_the_parts_and_the_knob():
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nBuffer 1: ...")
    assert here.out_of_memory(error) and not here.out_of_memory(RuntimeError("INVALID_ARGUMENT"))
    text = here.explain(tiny_config(rows=16), make_mesh(MeshConfig(1, 1, 1)).size, error)
    assert "Out of memory allocating 123 bytes" in text and text.count("GiB") == 3 and "--config." in text
