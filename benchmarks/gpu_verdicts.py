"""What is read off the parts of `gpu_all.py` together: ratios, the goals of the project, and the text for people.

Knows the figures that the programs write, not how they are made. A part that was stopped has only some of them.
"""

from typing import Any

WITHIN = 0.10  # of measured memory: what is promised of the plan's formula

Figures = dict[str, Any]


def figures_of(done: Figures) -> dict[str, Figures]:
    """By part, of those that wrote any."""
    return {name: part["figures"] for name, part in done.items() if "figures" in part}


def verdicts(done: Figures) -> Figures:
    """Of each training its share of the ceiling, ratios to torch, memory against the formula; and what leaks."""
    figures, found = figures_of(done), {}
    top = figures.get("ceilings", {}).get("matmul_tflops")
    for name, f in figures.items():
        if not name.startswith("train "):
            continue
        twin = figures.get(name.replace("train ", "torch "), {})
        speeds = {kind: f[kind]["tokens_per_second"] for kind in ("plain", "packed") if kind in f}
        found[name] = {
            "of_matmul_ceiling": round(f["plain"]["model_tflops"] / top, 3) if top and "plain" in f else None,
            "packed_over_plain": round(speeds["packed"] / speeds["plain"], 3) if len(speeds) == 2 else None,
            "memory_formula_over_measured": f["memory"]["formula_over_measured"] if "memory" in f else None,
            **{
                f"{kind}_over_torch": round(speed / twin[kind]["tokens_per_second"], 3)
                for kind, speed in speeds.items()
                if kind in twin and twin[kind]["rows"] == f["rows"]
            },
        }
    if "isolation" in figures:
        backends = figures["isolation"]["backends"]
        leaking = [name for name, value in backends.items() if value.get("leaks")]
        found["isolation"] = {"checked": len(backends), "leaking": leaking}
    return found


def attention(figures: dict[str, Figures], dim: int, length: int, *, plain: bool) -> Figures:
    """Our fastest side of one shape, forward and backward together, and how much faster than cuDNN's causal it is."""
    entries = [entry for name, f in figures.items() if name.startswith("attention") for entry in f["entries"]]
    for entry in entries:
        sides = [entry[side] for side in ("pallas", "mosaic") if "forward_ms" in entry.get(side, {})]
        if (entry["head_dim"], entry["length"], entry["documents"] == 1) == (dim, length, plain) and sides:
            best = min(sides, key=lambda side: side["forward_and_backward_ms"])
            causal = entry.get("cudnn_causal", {}).get("forward_and_backward_ms")
            faster = {"over_cudnn": round(causal / best["forward_and_backward_ms"], 2)} if causal else {}
            return {**best, **faster}
    return {}


def goals(done: Figures) -> list[Figures]:
    """{what, goal, got (None: not measured), met}: what the project wants of one H200."""
    figures, found = figures_of(done), verdicts(done)
    rows: list[tuple[str, float, Any]] = []
    for dim, forward, backward in ((64, 350, 260), (128, 480, 370)):
        one = attention(figures, dim, 4096, plain=True)
        rows.append((f"attention forward, head dim {dim}, causal 4K, TFLOP/s", forward, one.get("forward_tflops")))
        rows.append((f"attention backward, head dim {dim}, causal 4K, TFLOP/s", backward, one.get("backward_tflops")))
    for dim in (64, 128):
        got = attention(figures, dim, 16384, plain=False).get("over_cudnn")
        rows.append((f"attention, head dim {dim}, 8 documents in 16K, over cuDNN causal", 4.0, got))
    billion, of_billion = figures.get("train 1b", {}), found.get("train 1b", {})
    rows += [
        ("1.1B, 4K, MFU", 0.48, billion.get("plain", {}).get("mfu")),
        ("1.1B, 4K, tokens/s", 65_000, billion.get("plain", {}).get("tokens_per_second")),
        ("1.1B, packed over plain", 1.0, of_billion.get("packed_over_plain")),
        ("1.1B, plain, over torch.compile", 1.0, of_billion.get("plain_over_torch")),
        ("1.1B, packed, over torch.compile", 1.2, of_billion.get("packed_over_torch")),
        ("7B, full fine-tune, MFU", 0.42, figures.get("train 7b", {}).get("plain", {}).get("mfu")),
        ("23M, tokens/s", 1_000_000, figures.get("train 23m", {}).get("plain", {}).get("tokens_per_second")),
    ]
    result = [{"what": what, "goal": goal, "got": got, "met": None if got is None else got >= goal}
              for what, goal, got in rows]  # fmt: skip
    for name in ("train 1b", "train 7b"):
        ratio = found.get(name, {}).get("memory_formula_over_measured")
        met = None if ratio is None else abs(ratio - 1) <= WITHIN
        result.append({"what": f"{name}: memory by formula over measured", "goal": 1.0, "got": ratio, "met": met})
    leaking = found.get("isolation", {}).get("leaking")
    met = None if leaking is None else not leaking
    number = None if leaking is None else len(leaking)
    result.append({"what": "attention backends that let documents leak", "goal": 0, "got": number, "met": met})
    return result


def text(done: Figures) -> str:
    """For people: the parts, what they say together, and the goals as far as they were measured."""
    lines = ["", f"{'part':<16}{'status':<10}{'took':>7}"]
    for name, part in done.items():
        took = f"{part['seconds']:>5.0f} s" if "seconds" in part else f"{'':>7}"
        partly = "; some figures" if part["status"] != "done" and "figures" in part else ""
        lines.append(f"{name:<16}{part['status']:<10}{took}  {part.get('why', '')}{partly}".rstrip())
    for name, values in verdicts(done).items():
        words = [f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value is not None]
        lines.append(f"{name}: {', '.join(words)}")
    measured = [one for one in goals(done) if one["got"] is not None]
    lines += ["", f"{'goal':<66}{'wanted':>10}{'got':>12}"]
    for one in measured:
        lines.append(f"{one['what']:<66}{one['goal']:>10,}{one['got']:>12,}  {'met' if one['met'] else 'missed'}")
    lines.append(f"{len(goals(done)) - len(measured)} of {len(goals(done))} goals were not measured")
    return "\n".join(lines)
