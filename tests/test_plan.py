"""The plan: targets, the memory formula against real compilers, the knobs, the check before training."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import MODEL, Training, tiny_config

from nanollama import config_files, plan
from nanollama.config import ComputeConfig, ConfigError, MeshConfig, check
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
    ("configs/phase1.py", "h200x1", {"batch.micro_batches": 16, "compute.remat": "dots"}, 12.30, 36.69),
    ("configs/phase1.py", "h200x1", {"batch.micro_batches": 16, "compute.remat": "full"}, 12.30, 13.38),
    ("configs/phase1.py", "h200x2", {"batch.micro_batches": 4, "compute.remat": "dots"}, 6.15, 62.80),
    ("configs/phase1.py", "h100x2", {"batch.micro_batches": 8, "compute.remat": "full"}, 6.15, 10.69),
    ("configs/pretrain_7b.py", "h100x8", {"batch.micro_batches": 16}, 9.42, 11.43),
]


@pytest.mark.parametrize("fp8", [False, True])
def test_remat_dots_keeps_products_whose_gradients_are_our_own(fp8):
    config = tiny_config()
    compute = {remat: ComputeConfig(dtype="bfloat16", remat=remat, fp8=fp8) for remat in ("dots", "full")}
    kept = {remat: memory.kept_bytes(config.model, compute[remat], config.loss, 64) for remat in compute}
    products = 64 * 2 * config.model.num_layers * (2 * config.model.intermediate_size + config.model.hidden_size)
    assert kept["dots"][1] - kept["full"][1] > products


def test_remat_names_keeps_attention_s_output_and_logsumexp():
    """By the names that the kernels give them: under others a plan counted them as "full" does."""
    config, length = tiny_config(), 64
    kept = {remat: memory.kept_bytes(config.model, ComputeConfig(dtype="bfloat16", remat=remat), config.loss, length)
            for remat in ("names", "full")}  # fmt: skip
    m = config.model
    assert kept["names"][1] - kept["full"][1] == m.num_layers * length * m.num_heads * (2 * m.head_dim + 4)


@pytest.mark.parametrize(("spec", "target", "changes", "arguments", "temporaries"), COMPILED)
def test_formula_is_near_what_compilers_said(spec, target, changes, arguments, temporaries):
    config = config_files.load(str(ROOT / spec), [f"{name}={value}" for name, value in changes.items()])
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
    """Minutes of laptop time at 7B; here a model of two layers, whose collectives must be those of its layout. Its
    sizes fill a TPU's tiles of 8 x 128, to which smaller arrays are padded."""
    where = targets.parse(target)
    if absent := aot.missing(where):
        pytest.skip(absent)
    model = dataclasses.replace(MODEL, vocab_size=1024, hidden_size=512, intermediate_size=1024, head_dim=128)
    compute = ComputeConfig(scan_unroll=1, dtype="bfloat16", loss_chunk_tokens=128)
    config = tiny_config(rows=8, model=model, compute=compute, mesh=MeshConfig(data=1, fsdp=-1))
    compiled = aot.compile_step(config, where)
    sizes = mesh_sizes(config.mesh, where.count)
    assert sum(memory.state_bytes(config, sizes)) <= compiled.arguments <= 2 * sum(memory.state_bytes(config, sizes))
    assert compiled.aliased > 0.9 * sum(memory.state_bytes(config, sizes))
    assert compiled.temporaries > 0
    assert {"all-gather", "all-reduce", "reduce-scatter"} & set(compiled.collectives)


def test_command_line(capsys, tmp_path):
    command = [f"--config={ROOT / 'configs/phase1.py'}", "--target=h200x1", "--compile=no"]
    assert plan.main([*command, "--config.batch.micro_batches=1"]) == 1
    *text, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert not figures["fits"] and figures["parameters"] == 1_100_048_384
    assert any(line.startswith("fits       NO") for line in text)
    assert any(line.endswith("not compiled: --compile=no") for line in text)
    assert any(re.search(r"MFU \d+%, \d+ d \d+ h$", line) for line in text)
    best = figures["options"][0]
    assert best["total"] <= figures["target"]["memory"] and best["overrides"]
    assert plan.main([*command, *best["overrides"], f"--json={tmp_path / 'plan.json'}"]) == 0, "its own advice fits"
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"] and 0.3 < figures["run"]["mfu"] < 0.66
    assert figures["run"]["dollars"] == pytest.approx(figures["run"]["days"] * 24 * 3.8)


@pytest.mark.parametrize(("spec", "target", "count"), [
    ("configs/phase1.py", "h200x1", 16), ("configs/phase1.py", "h100x1", 32), ("configs/phase1.py", "h100x8", 2),
    ("configs/phase1.py", "h200x64", 1), ("configs/pretrain_7b.py", "h100x8", 2),
    ("configs/pretrain_7b.py", "v5p-256", 1),
])  # fmt: skip
def test_micro_batches_are_as_few_as_fit_the_target(capsys, spec, target, count):
    """One config from one GPU to a pod; half as many would not fit with the margin that the formula needs."""
    assert plan.main([f"--config={ROOT / spec}", f"--target={target}", "--compile=no"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    room = figures["target"]["memory"]
    assert figures["micro_batches"] == count and knobs.MARGIN * figures["formula"]["total"] <= room
    assert "as few as fit" in text[2]
    if count > 1:
        config = config_files.load(str(ROOT / spec), [f"batch.micro_batches={count // 2}"])
        assert knobs.MARGIN * knobs.evaluate(config, targets.parse(target)).memory.total > room


@pytest.mark.parametrize("changes", [{"determinism": "elastic"}, {"mesh": MeshConfig(stage=2)}])
def test_micro_batches_that_are_part_of_what_is_computed_are_never_chosen(changes):
    with pytest.raises(ConfigError, match=r"config\.batch\.micro_batches: 0 \(as few as fit\).* Give a number"):
        check(tiny_config(rows=16, micro_batches=0, **changes))


def test_rows_that_do_not_divide_are_planned_with_settings_that_do(capsys):
    """128 rows on 256 chips: all devices fsdp cannot run."""
    command = [f"--config={ROOT / 'configs/phase1.py'}", "--target=v5p-256", "--compile=no"]
    assert plan.main(command) == 1
    *text, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert text[0].startswith("refused    config.batch.global_rows: 128 is not divisible") and not figures["fits"]
    best = figures["options"][0]["overrides"]
    assert any(line.endswith("micro-batch of 1 row on a device, as few as fit") for line in text)
    assert any(re.search(r"%, \d+ min \d+ s$", line) for line in text)
    assert text[1].endswith(" ".join(best)) and figures["mesh"]["tensor"] == 2 and figures["rows_per_device"] == 1
    assert plan.main([*command, *best]) == 0, "its own advice runs"
    assert plan.main([*command, "--config.batch.global_rows=3"]) == 2
    assert "config.batch.global_rows: 3 is not divisible" in capsys.readouterr().err


def test_the_command_takes_no_accelerator(tmp_path):
    """In a process of its own that nothing told where to run; it compiles where a compiler is installed."""
    fields = {name: value for name, value in dataclasses.asdict(tiny_config(rows=8)).items() if value is not None}
    (tmp_path / "config.py").write_text(f"def get_config(arg):\n    return {fields!r}\n")
    done = subprocess.run(
        [sys.executable, "-m", "nanollama.plan", f"--config={tmp_path / 'config.py'}", "--target=h200x1",
         f"--json={tmp_path / 'plan.json'}"],
        cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert (figures["compiled"] is None) == (aot.missing(targets.parse("h200x1")) is not None)


@pytest.mark.parametrize(("argument", "message"), [
    ("--target=h300x8", "Did you mean 'h200'?"),
    ("--config.mesh.tensor=3", "config.mesh"),
    ("--config.batch.micro_batches=3", "config.batch.micro_batches"),
    ("--compile=yes", "nanollama[cuda-plan]"),
    ("--price=nan", "--price: nan. Give 0 or more."),
    ("--carbon=-1", "--carbon: -1. Give 0 or more."),
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
    with pytest.raises(ConfigError, match=r"use more devices, or a smaller model\. See"):
        here.check_memory(config, 1)


# As the GPU runtime prints it, and as TPU compilers did before they printed one line; the list is not always in order.
GPU_ERROR = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes.
BufferAssignment OOM Debugging.
BufferAssignment stats:
             parameter allocation:   12.30GiB
                 total allocation:   66.20GiB
Peak buffers:
\tBuffer 1:
\t\tSize: 512.00MiB
\t\tEntry Parameter Subshape: f32[22,2048,2048]
\t\t==========================

\tBuffer 2:
\t\tSize: 32.00GiB
\t\tOperator: op_name="jit(train_step)/jit(main)/jvp(Decoder)/mlp/dot_general" source_file="step.py" source_line=9
\t\tXLA Label: fusion
\t\tShape: bf16[22,65536,5632]
\t\t==========================

\tBuffer 3:
\t\tSize: 0.98GiB
\t\tEntry Parameter Subshape: f32[22,2048,5632]
\t\t==========================

\tBuffer 4:
\t\tSize: 384.0KiB
\t\tEntry Parameter Subshape: f32[256,384]
\t\t==========================
"""
TPU_ERROR = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.40G of 15.48G hbm.
  Largest program allocations in hbm:

  1. Size: 16.00G
     Operator: op_name="jit(train_step)/jit(main)/transpose(jvp(Decoder))/attention/dot_general" source_file="x.py"
     Shape: f32[65536,65536]{1,0:T(8,128)}
     Unpadded size: 16.00G
     XLA label: %fusion.2 = f32[65536,65536]{1,0:T(8,128)} fusion(f32[8]{0} %p.1)
     Allocation type: HLO temp
     ==========================

  2. Size: 570.00M
     Shape: f32[29184,2,2560]{2,1,0:T(2,128)}
     ==========================
"""


def test_out_of_memory_names_the_largest_buffers_and_the_knob():
    config, devices = tiny_config(rows=16), make_mesh(MeshConfig(1, 1, 1)).size
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nBuffer 1: ...")
    assert here.out_of_memory(error) and not here.out_of_memory(RuntimeError("INVALID_ARGUMENT"))
    text = here.explain(config, devices, error)  # XLA says nothing of buffers: the formula's parts
    assert "Out of memory allocating 123 bytes" in text and text.count("GiB") == 3 and "--config." in text
    text = here.explain(config, devices, RuntimeError(GPU_ERROR))
    assert text.splitlines()[1] == (
        "The largest buffers on a device, by XLA: 32.00 GiB bf16[22,65536,5632] (jvp(Decoder)/mlp/dot_general); "
        "0.98 GiB f32[22,2048,5632] (no operation given); 0.50 GiB f32[22,2048,2048] (no operation given)."
    )
    assert "--config." in text and "by formula" in text
    assert here.largest_buffers(TPU_ERROR) == [
        "16.00 GiB f32[65536,65536] (transpose(jvp(Decoder))/attention/dot_general)",
        "0.56 GiB f32[29184,2,2560] (no operation given)",
    ]
