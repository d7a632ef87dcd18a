"""Our training agrees with PyTorch's: 200 AdamW steps from the same weights and batches, without PyTorch.

`python benchmarks/train_cpu.py --agreement` wrote the losses; weights and batches are made again from their seeds.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import flax_side, jax_side, workload
from nanollama.config import ComputeConfig

pytestmark = pytest.mark.core

GOLDEN = json.loads((Path(__file__).parent / "golden" / "torch_losses_200.json").read_text())["runs"]
TOLERANCE = 1e-3  # nats, at every step: the claim; what was seen is 4e-6
COMPUTE = ComputeConfig(scan_unroll=1)  # compiles faster


def check(losses: list[float], name: str) -> None:
    """Errors: AssertionError naming the first step that is further off than TOLERANCE."""
    golden = GOLDEN[name]["losses"]
    off = [abs(ours - theirs) > TOLERANCE for ours, theirs in zip(losses, golden, strict=False)]
    assert len(losses) and not any(off), (
        f"{name}: step {off.index(True)}: ours {losses[off.index(True)]:.6f}, PyTorch's {golden[off.index(True)]:.6f}"
    )


@functools.cache
def recipe(name: str) -> workload.Workload:
    return workload.from_dict(GOLDEN[name]["workload"])


@pytest.mark.parametrize("name", GOLDEN)
def test_inputs_are_those_pytorch_saw(name: str) -> None:
    inputs = workload.make_weights(recipe(name)) | workload.make_batches(recipe(name))
    assert workload.digest(inputs) == GOLDEN[name]["inputs_sha256"], (
        "the recipe makes other weights or batches than those of the golden file (another numpy?): "
        "run benchmarks/train_cpu.py --agreement again"
    )


def first_steps(work: workload.Workload, batches: dict[str, np.ndarray], steps: int) -> list[float]:
    training = jax_side.Training(work, COMPUTE)
    return [training.train({name: array[step] for name, array in batches.items()}) for step in range(steps)]


@pytest.mark.parametrize("name, steps", [("agreement", 200), ("agreement-packed", 60)])
def test_losses_agree_with_pytorch_at_every_step(name: str, steps: int) -> None:
    losses = first_steps(recipe(name), workload.make_batches(recipe(name)), steps)
    check(losses, name)
    assert losses[-1] < losses[0] - 1.5, "it learned: the updates were compared, not only the first forward pass"


@pytest.mark.parametrize("name", GOLDEN)
def test_plain_flax_is_the_same_model(name: str, tmp_path: Path) -> None:
    """The side that `train_cpu.py` times beside ours: else the ratio would compare two models."""
    workload.save(tmp_path / "work.npz", recipe(name))
    check(flax_side.run(str(tmp_path / "work.npz"), steps=20)["losses"], name)


def test_a_slip_in_the_optimizer_is_caught() -> None:
    """b2 = 0.99: seen to cross the tolerance at step 17. (No clipping: step 7, no z-loss: 1, no decay: 42.)"""
    work = recipe("agreement")
    losses = first_steps(dataclasses.replace(work, b2=0.99), workload.make_batches(work), 20)
    with pytest.raises(AssertionError, match="step 1"):
        check(losses, "agreement")


def test_a_leak_between_documents_is_caught() -> None:
    work = recipe("agreement-packed")
    batches = workload.make_batches(work)
    batches["first_key"][:] = 0
    with pytest.raises(AssertionError, match="step 1"):
        check(first_steps(work, batches, 3), "agreement-packed")
