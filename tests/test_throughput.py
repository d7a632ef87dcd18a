"""Speed figures mean what they say, and what MFU is measured against is said."""

import types

import jax
import pytest

from nanollama.accelerators import peak_flops
from nanollama.training.throughput import Throughput, memory_bytes, total_peak


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_out_compilation_and_pauses():
    clock = Clock()
    speed = Throughput(steps=12, flops_per_token=2.0, peak=1000.0, window=4, clock=clock)
    clock.now += 50  # compilation
    assert speed.update(1, 100) == {}
    for step in range(2, 11):
        with speed.pause():
            clock.now += 3  # validation
        clock.now += 1
        figures = speed.update(step, 100)
    assert figures["tokens_per_second"] == pytest.approx(100.0)
    assert figures["seconds"] == pytest.approx(1.0)
    assert figures["mfu"] == pytest.approx(100 * 2 / 1000)
    assert figures["eta_seconds"] == pytest.approx(2 * 4.0)  # a person waits for the pauses too
    clock.now += 2
    assert speed.update(11, 500)["tokens_per_second"] == pytest.approx((300 + 500) / 5)  # window of 4 steps


def test_throughput_without_a_known_peak_has_no_mfu():
    clock = Clock()
    speed = Throughput(steps=5, flops_per_token=2.0, peak=None, clock=clock)
    speed.update(1, 10)
    clock.now += 1
    assert "mfu" not in speed.update(2, 10)


@pytest.mark.parametrize(("kind", "platform", "peak"), [
    ("NVIDIA H100 80GB HBM3", "gpu", 989e12), ("NVIDIA H100 PCIe", "gpu", 756e12),
    ("NVIDIA H200", "gpu", 989e12), ("NVIDIA A100-SXM4-40GB", "gpu", 312e12),
    ("NVIDIA GH200 480GB", "gpu", 989e12), ("TPU v4", "tpu", 275e12), ("TPU v5 lite", "tpu", 197e12),
    ("TPU v5", "tpu", 459e12), ("TPU v5p", "tpu", 459e12), ("TPU v6 lite", "tpu", 918e12),
    ("TPU v6e", "tpu", 918e12), ("Something new", "gpu", None), ("cpu", "cpu", None)])
def test_peak_flops(kind, platform, peak):
    device = types.SimpleNamespace(device_kind=kind, platform=platform, process_index=0)
    assert peak_flops(kind) == peak
    if platform != "cpu":
        total, text = total_peak([device, device])
        assert total == (peak and 2 * peak) and ("not measured" in text) == (peak is None)


def test_cpu_ceiling_is_measured_and_said():
    devices = jax.devices("cpu")
    peak, text = total_peak(devices * 8)  # eight virtual devices share one host
    assert peak is not None and 1e8 < peak < 1e14
    assert "measured on this CPU" in text and "causal attention" in text and "remat not counted" in text


def test_memory_is_at_least_this_process():
    assert 10 * 2**20 < memory_bytes() < 2**42
