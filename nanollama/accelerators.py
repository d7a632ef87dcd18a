"""What makers publish of accelerators, and the grid's carbon: the figures that plans, estimates and MFU have in common.

Owns the dense peak rates. Knows no machine that is at hand. Standard library only.
"""

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets (sparsity left out). The first name that
# the lower-cased kind of device contains wins, so longer names come first.
PEAK_FLOPS = {
    "b200": 2250e12, "h200": 989e12, "gh200": 989e12, "h100 pcie": 756e12, "h100 nvl": 835e12, "h100": 989e12,
    "a100": 312e12, "l40s": 362e12, "mi300x": 1307e12,
    "tpu v6": 918e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12, "tpu v5": 459e12, "tpu v4": 275e12,
}  # JAX names: "TPU v6 lite" = v6e, "TPU v5 lite" = v5e, "TPU v5" = v5p
WORLD_CARBON = 0.473  # kg CO2 a kWh, the world's average of 2024 (Ember, Global Electricity Review 2025)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this kind, as JAX or its maker names it; None where the table lacks it."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in kind.lower()), None)
