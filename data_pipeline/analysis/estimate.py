"""What a training run would take: time, energy, money and carbon, from a formula whose inputs are all shown.

Owns the formula and the published figures of accelerators. Knows nothing of models in detail or of any run: what
was measured is always better than this.
"""

import dataclasses
import math
from typing import NamedTuple

from nanollama.accelerators import PEAK_FLOPS, WORLD_CARBON
from nanollama.data.files import DataError
from nanollama.data.strict import nearest
from nanollama.quantities import amount


class Accelerator(NamedTuple):
    """Published figures of one device."""

    name: str
    peak_flops: float  # dense BF16 per second
    watts: float | None  # board power by its data sheet; None: not published


ACCELERATORS: dict[str, Accelerator] = {
    "a100": Accelerator("NVIDIA A100 SXM", PEAK_FLOPS["a100"], 400),
    "h100": Accelerator("NVIDIA H100 SXM", PEAK_FLOPS["h100"], 700),
    "h200": Accelerator("NVIDIA H200 SXM", PEAK_FLOPS["h200"], 700),
    "b200": Accelerator("NVIDIA B200", PEAK_FLOPS["b200"], 1000),
    "l40s": Accelerator("NVIDIA L40S", PEAK_FLOPS["l40s"], 350),
    "mi300x": Accelerator("AMD MI300X", PEAK_FLOPS["mi300x"], 750),
    "tpu-v4": Accelerator("Google TPU v4", PEAK_FLOPS["tpu v4"], None),
    "tpu-v5e": Accelerator("Google TPU v5e", PEAK_FLOPS["tpu v5e"], None),
    "tpu-v5p": Accelerator("Google TPU v5p", PEAK_FLOPS["tpu v5"], None),
    "tpu-v6e": Accelerator("Google TPU v6e", PEAK_FLOPS["tpu v6"], None),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything the estimate depends on."""

    tokens: float
    parameters: float  # without embeddings, active ones of a mixture of experts
    accelerator: str = "h100"
    count: int = 8
    mfu: float = 0.4  # share of peak that is reached
    layers: int = 0  # with width and sequence_length: attention is counted too
    width: int = 0
    sequence_length: int = 0
    price: float | None = None  # of one device for an hour
    pue: float = 1.2  # power of the building over power of the devices
    watts: float | None = None  # of one device; default: its data sheet's
    carbon_intensity: float = WORLD_CARBON  # kg CO2 a kWh

    def check(self) -> None:
        """Raises DataError on values that cannot be meant."""
        if self.accelerator not in ACCELERATORS:
            raise DataError(f"--accelerator={self.accelerator}: "
                            f"{nearest(self.accelerator, list(ACCELERATORS))}")
        above = {"tokens": self.tokens, "parameters": self.parameters, "count": self.count, "mfu": self.mfu,
                 "pue": self.pue}
        for name, value in above.items():
            if not 0 < value < math.inf:
                raise DataError(f"--{name}={value}: give a number above 0.")
        if self.mfu > 1:
            raise DataError(f"--mfu={self.mfu}: it is a share of the peak; give 0.4 for 40 %.")
        if self.pue < 1:
            raise DataError(f"--pue={self.pue}: a building cannot use less than its devices; give 1.0 or more.")
        for name in ("price", "watts", "carbon_intensity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise DataError(f"--{name.replace('_', '-')}={value}: give 0 or more.")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What follows; None where an input is not known."""

    flops_per_token: float
    flops: float
    seconds: float
    device_hours: float
    tokens_per_second: float
    kwh: float | None
    money: float | None
    carbon_kg: float | None


def estimate(inputs: Inputs) -> Estimate:
    """Time, energy, money and carbon of a run. Errors: DataError.

    Forward and backward take 6 FLOPs a parameter and token (Kaplan et al. 2020, arXiv:2001.08361) and causal attention
    6 x layers x width x sequence length a token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, halved).
    """
    inputs.check()
    device = ACCELERATORS[inputs.accelerator]
    flops_per_token = 6 * inputs.parameters + 6 * inputs.layers * inputs.width * inputs.sequence_length
    flops = flops_per_token * inputs.tokens
    seconds = flops / (inputs.count * device.peak_flops * inputs.mfu)
    hours = seconds / 3600 * inputs.count
    watts = inputs.watts if inputs.watts is not None else device.watts
    kwh = None if watts is None else hours * watts / 1000 * inputs.pue
    return Estimate(flops_per_token, flops, seconds, hours, inputs.tokens / seconds, kwh,
                    None if inputs.price is None else hours * inputs.price,
                    None if kwh is None else kwh * inputs.carbon_intensity)


def formulas(inputs: Inputs) -> list[tuple[str, str]]:
    """(quantity, how it is computed, with the numbers put in)."""
    device, result = ACCELERATORS[inputs.accelerator], estimate(inputs)
    watts = inputs.watts if inputs.watts is not None else device.watts
    attention = (f" + 6 x {inputs.layers} layers x {inputs.width} wide x {inputs.sequence_length} long"
                 if inputs.layers * inputs.width * inputs.sequence_length else "")
    rows = [
        ("FLOPs a token", f"6 x {inputs.parameters:.4g} parameters{attention} = {result.flops_per_token:.4g}"),
        ("FLOPs", f"{result.flops_per_token:.4g} x {inputs.tokens:.4g} tokens = {result.flops:.4g}"),
        ("Seconds", f"{result.flops:.4g} / ({inputs.count} x {device.peak_flops:.4g} peak x {inputs.mfu:g} MFU) = "
         f"{result.seconds:.4g}"),
        ("Device hours", f"{result.seconds:.4g} s / 3600 x {inputs.count} = {amount(result.device_hours)}"),
    ]
    if result.kwh is not None and result.carbon_kg is not None:
        rows.append(("kWh", f"{amount(result.device_hours)} h x {watts:g} W / 1000 x {inputs.pue:g} PUE = "
                     f"{amount(result.kwh)}"))
        rows.append(("kg CO2", f"{amount(result.kwh)} kWh x {inputs.carbon_intensity:g} kg/kWh = "
                     f"{amount(result.carbon_kg)}"))
    if result.money is not None:
        rows.append(("Money", f"{amount(result.device_hours)} h x {inputs.price:g} = {amount(result.money)}"))
    return rows
