"""The benchmarks of a GPU run where there is none: whole and tiny, with nothing installed but what they may import."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_all, gpu_verdicts, scaling, train_gpu
from nanollama.config import MeshConfig, ModelConfig
from nanollama.models.accounting import count_parameters
from nanollama.parallel.mesh import mesh_sizes
from nanollama.planning.memory import estimate

ROOT = Path(__file__).resolve().parent.parent

# What jax, flax and optax bring with them; nothing else that this project installs is on the machine with the GPU.
ABSENT = (
    "orbax", "tensorstore", "grain", "array_record", "sentencepiece", "ml_collections", "clu", "pyarrow", "polars",
    "tensorboardX", "jinja2", "markupsafe", "torch", "transformers", "sklearn", "pandas",
)  # fmt: skip
PROGRAMS = ("ceilings", "attention", "isolation", "train_gpu", "decode", "gpu_all", "gpu_verdicts", "flax_side")

BLOCKER = """
    import importlib, sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {absent!r}:
                raise ModuleNotFoundError(f"{{name}} is not on this machine")

    sys.meta_path.insert(0, Blocker())
    for program in {programs!r}:
        importlib.import_module("benchmarks." + program)
"""


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)


def test_they_import_what_a_gpu_machine_has() -> None:
    done = python(BLOCKER.format(absent=ABSENT, programs=PROGRAMS))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_blocker_blocks() -> None:
    done = python(BLOCKER.format(absent=ABSENT, programs=("checkpoint",)))
    assert "orbax is not on this machine" in done.stderr


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0")  # compiles faster
        assert gpu_all.main(["--smoke", f"--out={out}"]) == 0
    return out, json.loads(out.read_text())


def test_smoke(smoke: tuple[Path, dict[str, Any]]) -> None:
    parts = smoke[1]["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {p.name: "done" for p in gpu_all.smoke_parts()}
    train = parts["train tiny"]["figures"]
    assert train["plain"]["finite"] and train["packed"]["finite"]
    assert train["plain"]["losses"][0] == pytest.approx(5.55, abs=0.1)  # ln 256: fresh weights know nothing
    assert train["memory"]["compiler_gib"] > 0
    assert [one["what"] for one in smoke[1]["goals"] if one["got"] is not None] == [
        "attention backends that let documents leak"], "tiny sizes reach no other goal"  # fmt: skip
    assert smoke[1]["verdicts"]["isolation"] == {"checked": 2, "leaking": []}
    assert "refused" in parts["isolation"]["figures"]["backends"]["cudnn, head dim 16"]
    share = train["plain"]["model_tflops"] / parts["ceilings"]["figures"]["matmul_tflops"]
    assert smoke[1]["verdicts"]["train tiny"]["of_matmul_ceiling"] == pytest.approx(share, abs=1e-3)


def test_what_is_done_is_not_done_again(
    smoke: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    parts = {**smoke[1]["parts"], "decode": {"status": "failed", "why": "for the test"}}
    out.write_text(json.dumps({**smoke[1], "parts": parts}))
    ran = []
    monkeypatch.setattr(gpu_all, "run", lambda part, *_: ran.append(part.name) or {"status": "done", "seconds": 0.0})
    assert gpu_all.main(["--smoke", f"--out={out}"]) == 0
    assert ran == ["decode"]
    gpu_all.main(["--smoke", "--fresh", f"--out={out}"])
    assert ran[1:] == [part.name for part in gpu_all.smoke_parts()]


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gpu_all.Part("wrong", 60, ("ceilings.py", "--size=no"))
    program = tmp_path / "slow.py"  # writes half of its figures, and hangs
    program.write_text("import pathlib, sys, time; pathlib.Path(sys.argv[1][6:]).write_text('{}'); time.sleep(600)")
    slow = gpu_all.Part("slow", 60, (str(program),))
    monkeypatch.setattr(gpu_all, "smoke_parts", lambda: [wrong, slow])
    monkeypatch.setattr(gpu_all, "allowed", lambda part, *_: 60 if part is wrong else 1)
    out = tmp_path / "gpu.json"
    assert gpu_all.main(["--smoke", f"--out={out}"]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["wrong"]["status"] == "failed" and "invalid int value: 'no'" in parts["wrong"]["why"]
    assert (parts["slow"]["status"], parts["slow"]["figures"]) == ("stopped", {})
    assert gpu_all.main(["--smoke", "--budget=1", f"--out={out}"]) == 1
    assert json.loads(out.read_text())["parts"]["wrong"]["status"] == "failed", "as it was: there was no time to try it"


def simulated(
    needs: dict[str, float], monkeypatch: pytest.MonkeyPatch, out: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """(seconds each part got in all, parts) of a call in which parts need so many seconds (default: five)."""
    clock, got = [0.0], {}

    def run(part: gpu_all.Part, limit: float, *_: Any) -> dict[str, Any]:
        wanted = needs.get(part.name, 5.0)
        clock[0] += min(limit, wanted)
        got[part.name] = got.get(part.name, 0.0) + min(limit, wanted)
        if wanted > limit:
            return {"status": "stopped", "seconds": limit, "why": "for the test"}
        return {"status": "done", "seconds": wanted}

    monkeypatch.setattr(gpu_all, "run", run)
    monkeypatch.setattr(gpu_all.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_all, "has_torch", lambda _: True)
    gpu_all.main([f"--out={out}"])
    assert clock[0] <= gpu_all.BUDGET
    return got, json.loads(out.read_text())["parts"]


def test_the_budget_holds_and_nothing_takes_what_is_kept_for_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = {part.name: part.kept for part in gpu_all.parts() if part.kept}
    assert sum(kept.values()) <= gpu_all.BUDGET - 10, "ten seconds are for looking for PyTorch, and for writing"
    out = tmp_path / "gpu.json"
    got, parts = simulated({part.name: 1e9 for part in gpu_all.parts()}, monkeypatch, out)
    assert all(got[name] >= seconds for name, seconds in kept.items())
    assert {part["status"] for name, part in parts.items() if name not in kept} == {"left out"}
    slowest = {"attention 64": 120.0, "torch 125m": 1e9}  # tried again when the others are through
    got, parts = simulated(slowest, monkeypatch, out)
    assert parts["attention 64"]["status"] == "done" and got["torch 125m"] == gpu_all.MOST
    assert [name for name, part in parts.items() if part["status"] != "done"] == ["torch 125m"]
    got, parts = simulated({}, monkeypatch, out)
    assert list(got) == ["torch 125m"] and {part["status"] for part in parts.values()} == {"done"}


def test_twins_are_left_out_without_torch() -> None:
    left = gpu_all.without_torch(gpu_all.parts())
    assert [part.name for part in left] == [part.name for part in gpu_all.parts() if "torch" not in part.name]
    assert not any(gpu_all.TORCH in word for part in left for word in part.command)


def test_verdicts() -> None:
    def training(tokens: int, formula: float) -> dict[str, Any]:
        each = {"tokens_per_second": tokens, "model_tflops": 300.0, "rows": 8}
        return {"plain": each, "packed": {**each, "tokens_per_second": 2 * tokens}, "rows": 8,
                "memory": {"formula_over_measured": formula}}  # fmt: skip

    parts = {
        "ceilings": {"figures": {"matmul_tflops": 600.0}},
        "train 1b": {"figures": training(100, 0.89)},
        "torch 1b": {"figures": training(80, 1.0)},
        "train 7b": {"figures": training(10, 1.09)},
    }
    found = gpu_verdicts.verdicts(parts)
    assert found["train 1b"] == {
        "of_matmul_ceiling": 0.5, "packed_over_plain": 2.0, "memory_formula_over_measured": 0.89,
        "plain_over_torch": 1.25, "packed_over_torch": 1.25,
    }  # fmt: skip
    assert "plain_over_torch" not in found["train 7b"]
    parts["attention 64"] = {"figures": {"entries": [
        {"head_dim": 64, "length": 4096, "documents": 1, "cudnn_causal": {"forward_and_backward_ms": 1.0},
         "pallas": {"forward_ms": 1.0, "forward_and_backward_ms": 4.0, "forward_tflops": 100, "backward_tflops": 300},
         "mosaic": {"forward_ms": 1.0, "forward_and_backward_ms": 2.0, "forward_tflops": 400, "backward_tflops": 200}},
        {"head_dim": 64, "length": 16384, "documents": 8, "cudnn_causal": {"forward_and_backward_ms": 9.0},
         "pallas": {"forward_ms": 1.0, "forward_and_backward_ms": 2.0}, "mosaic": {"failed": "for the test"}},
    ]}}  # fmt: skip
    parts["train 23m"] = {"status": "stopped", "seconds": 1.0, "figures": {"rows": 1, "plain": {
        "tokens_per_second": 10, "model_tflops": 1.0}}}  # fmt: skip
    met = {one["what"]: (one["got"], one["met"]) for one in gpu_verdicts.goals(parts)}
    assert met["attention forward, head dim 64, causal 4K, TFLOP/s"] == (400, True)
    assert met["attention backward, head dim 64, causal 4K, TFLOP/s"] == (200, False)
    assert met["attention, head dim 64, 8 documents in 16K, over cuDNN causal"] == (4.5, True)
    assert met["attention forward, head dim 128, causal 4K, TFLOP/s"] == (None, None)
    assert met["train 1b: memory by formula over measured"] == (0.89, False)
    assert met["train 7b: memory by formula over measured"] == (1.09, True)
    assert met["1.1B, packed, over torch.compile"] == (1.25, True) and met["23M, tokens/s"] == (10, False)


@pytest.mark.parametrize("name", ["125m", "1b", "1b-full", "7b"])
def test_every_case_has_a_setting_for_an_h200(name: str) -> None:
    case = train_gpu.cases()[name]
    needed = []
    for setting in case.settings:
        run = train_gpu.config(case, setting, packed=False, dtype="bfloat16")
        needed.append(estimate(run, mesh_sizes(run.mesh, 1)).total / 2**30)
    assert needed == sorted(needed, reverse=True)
    assert min(needed) < train_gpu.ROOM * 0.95 * 139


def test_collectives_of_tuples_are_counted() -> None:
    text = """
  %all-reduce.1 = (f32[8,4]{1,0}, f32[], /*index=5*/bf16[2]{0}) all-reduce(%a, %b, %c), channel_id=1
  ROOT %g = f32[16]{0} all-gather(%x), dimensions={0}
  %u = f32[99]{0} add(%all-gather.3, %y), metadata={op_name="all-gather("}
"""
    assert scaling.collectives(text) == {
        "all-reduce": {"count": 1, "bytes": 8 * 4 * 4 + 4 + 2 * 2},
        "all-gather": {"count": 1, "bytes": 64},
    }


def test_devices_share_the_work() -> None:
    model = ModelConfig(128, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    one, two = (scaling.measure(model, MeshConfig(data=count), rows=4, length=16) for count in (1, 2))
    assert two["flops"] < 0.55 * one["flops"] and one["collectives"] == {}
    gradients = 4 * count_parameters(model).total
    assert two["collectives"]["all-reduce"]["bytes"] >= gradients
