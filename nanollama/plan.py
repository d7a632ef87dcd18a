"""`python -m nanollama.plan --config=configs/phase1.py --target=h200x1`: what a run needs, before it runs.

Bytes per device, floating-point operations, seconds, money and carbon, for this machine or one that is not here; and
what to change where it does not fit. Text for people, then one line of JSON. Owns the report; `nanollama.planning`
has the figures. Exit status: 0 it fits, 1 it does not, 2 refused.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from nanollama import config_files
from nanollama.accelerators import WORLD_CARBON
from nanollama.config import Config, ConfigError
from nanollama.data.files import DataError, write_json
from nanollama.data.strict import FieldError
from nanollama.models.accounting import MFU_CONVENTION, count_parameters, flops_per_token
from nanollama.parallel import backend
from nanollama.parallel.mesh import mesh_sizes
from nanollama.planning import aot, here, knobs, memory, roofline, shardings, targets
from nanollama.planning.targets import GIB, Target
from nanollama.quantities import amount, duration
from nanollama.training.step import check_rows

_MEMORY_ROWS = ("parameters", "optimizer", "batch", "gradients", "activations", "workspace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollama.plan", description="What a config needs: memory, time, money; and does it fit.",
        epilog="Any field of the config can be given: --config.compute.remat=full")  # fmt: skip
    parser.add_argument("--config", required=True, help="path.py or path.py:argument, e.g. configs/phase1.py")
    parser.add_argument("--target", default="cpu", help="cpu (this machine), or h200x8, h100x64, a100x1, b200x8, "
                        "v5p-256, v5e-16, v6e-64, v4-32")  # fmt: skip
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto",
                        help="compile for the target: where its compiler is installed, always, never")  # fmt: skip
    parser.add_argument("--price", type=float, help="dollars per device and hour; default: a list price")
    parser.add_argument("--carbon", type=float, default=WORLD_CARBON, help="kg of CO2 per kWh (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here, and not as the last line")
    parser.add_argument("--shardings", action="store_true", help="print where each parameter lives, and stop")
    options, rest = parser.parse_known_args(arguments)
    # A plan needs no accelerator, and takes none from who uses it.
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # options are attributes made at import
        jax.config.update("jax_platforms", "cpu")
    try:
        for name in ("price", "carbon"):
            value = getattr(options, name)
            if value is not None and not 0 <= value < math.inf:
                raise FieldError(f"--{name}", f"{value:g}", "Give 0 or more.")
        config = config_files.load(options.config, config_files.overrides(rest))
        target = here.this_machine(config) if options.target == "cpu" else targets.parse(options.target)
        if options.shardings:
            print(shardings.table(config, mesh_sizes(config.mesh, target.count)))
            return 0
        figures, text = plan(config, target, compile_it=options.compile, price=options.price, carbon=options.carbon)
    except (ConfigError, FieldError, DataError, backend.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.json:
        write_json(options.json, figures)
    else:
        print(json.dumps(figures))
    return 0 if figures["fits"] else 1


def plan(config: Config, target: Target, *, compile_it: str = "auto", price: float | None = None,
         carbon: float = WORLD_CARBON) -> tuple[dict[str, Any], str]:  # fmt: skip
    """(figures, report). Errors: ConfigError where the config cannot run on so many devices at all."""
    room = target.device.memory
    fitted = not config.batch.micro_batches
    if fitted:
        sizes, kernel = mesh_sizes(config.mesh, target.count), target.device.platform != "cpu"
        config = knobs.with_micro_batches(config, knobs.fewest_micro_batches(config, sizes, room, kernel=kernel))
    option = knobs.evaluate(config, target)
    options = knobs.fitting(config, target, room)
    refused = _rows_refused(config, option.sizes)
    if refused:  # the best setting that can run is planned instead
        if not options:
            raise refused
        option = options[0]
    # Where the formula is sure that it does not fit, the best setting that does is compiled instead.
    tried = options[0] if options and option.memory.total > here.SURE * room else option
    compiled, why_not = _compile(tried.config, target, compile_it)
    fits = tried is option and (compiled.total if compiled else option.memory.total) <= room
    fits = fits and not refused and not why_not.startswith("out of memory")
    cost = roofline.bill(config, target, option.time.total, price=price, carbon=carbon)
    verdict = Verdict(config, target, option, options, tried, compiled, why_not, fits, cost, str(refused or ""), fitted)
    return _figures(verdict), _report(verdict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All that a report says."""

    config: Config
    target: Target
    option: knobs.Option  # the config as it is; or the first of `options`, where that is `refused`
    options: list[knobs.Option]  # what fits by formula, fastest first
    tried: knobs.Option  # what was compiled: `option`, or the first of `options`
    compiled: aot.Compiled | None
    why_not: str  # why nothing was compiled
    fits: bool  # the config as it is
    cost: roofline.Bill
    refused: str  # why the config as it is cannot run on so many devices, if it cannot
    fitted: bool  # the config left the number of micro-batches open


def _rows_refused(config: Config, sizes: dict[str, int]) -> ConfigError | None:
    """What the train step would say where the rows do not divide over the devices."""
    if config.determinism == "elastic":  # there each micro-batch is whole on one device
        return None
    try:
        check_rows(config, sizes)
    except ConfigError as error:
        return error
    return None


def _compile(config: Config, target: Target, compile_it: str) -> tuple[aot.Compiled | None, str]:
    """The compiled figures, or why there are none."""
    why_not = "elastic mode has no single program" if config.determinism == "elastic" else aot.missing(target)
    if compile_it == "no":
        return None, "--compile=no"
    if compile_it == "auto" and target.device.platform == "cpu":
        return None, why_not or "for this machine only with --compile=yes"
    if why_not:
        if compile_it == "yes":
            raise ConfigError("--compile", why_not, "Or leave --compile=yes out: the formula needs no compiler.")
        return None, why_not
    # A scanned layer compiles once; unrolled ones give nearly the same memory after many minutes.
    scanned = dataclasses.replace(config, compute=dataclasses.replace(config.compute, scan_unroll=1))
    print(f"compiling for {target.name}; the formula alone: --compile=no", file=sys.stderr, flush=True)
    try:
        return aot.compile_step(scanned, target), ""
    except Exception as error:  # XlaRuntimeError is not public under one name in all versions
        if not here.out_of_memory(error):
            raise
        return None, f"out of memory: {str(error).strip().splitlines()[0][:300]}"


def _figures(v: Verdict) -> dict[str, Any]:
    config, target, option, compiled = v.option.config, v.target, v.option, v.compiled
    count, flops = count_parameters(config.model), flops_per_token(config.model, config.data.sequence_length)
    formula = {**dataclasses.asdict(option.memory), "arguments": option.memory.arguments,
               "temporaries": option.memory.temporaries, "total": option.memory.total}  # fmt: skip
    return {
        "name": config.name,
        "target": {"name": target.name, "kind": target.device.kind, "count": target.count,
                   "memory": target.device.memory},
        "mesh": option.sizes,
        "parameters": count.total,
        "non_embedding": count.non_embedding,
        "flops_per_token": flops.train,
        "tokens_per_step": config.batch.global_rows * config.data.sequence_length,
        "micro_batches": config.batch.micro_batches,
        "rows_per_device": memory.rows_on_device(config, option.sizes),
        "formula": formula,
        "compiled": {**dataclasses.asdict(compiled), "total": compiled.total,
                     "overrides": v.tried.overrides(v.config)} if compiled else None,
        "not_compiled": v.why_not,
        "refused": v.refused,
        "fits": v.fits,
        "options": [{"overrides": o.overrides(v.config), "total": o.memory.total, "seconds": o.time.total}
                    for o in v.options],
        "step": {**dataclasses.asdict(option.time), "total": option.time.total, "limit": option.time.limit},
        "run": {**dataclasses.asdict(v.cost), "steps": config.steps,
                "tokens_per_day": v.cost.tokens_per_second * 86400},
    }  # fmt: skip


def _report(v: Verdict) -> str:
    refused = [
        f"refused    {v.refused}",
        f"           so this is the plan with {' '.join(v.option.overrides(v.config))}",
    ] if v.refused else []  # fmt: skip
    return "\n".join([*refused, *_heading(v), *_memory_lines(v), *_advice(v), *_time_lines(v)])


def _heading(v: Verdict) -> list[str]:
    config, target, sizes = v.option.config, v.target, v.option.sizes
    count, rows, length = count_parameters(config.model), config.batch.global_rows, config.data.sequence_length
    flops, micro = flops_per_token(config.model, length).train, config.batch.micro_batches
    on_device, fitted = memory.rows_on_device(config, sizes), ", as few as fit" if v.fitted else ""
    lines = [
        f"{config.name} on {target.count} x {target.device.kind}",
        f"model      {count.total:,} parameters ({count.non_embedding:,} without the embedding), {flops / 1e9:.4g} "
        "GFLOP per token",
        f"batch      {rows} rows x {length:,} = {rows * length:,} tokens a step; {micro} micro-batch"
        f"{'es' if micro > 1 else ''} of {on_device} row{'s' if on_device > 1 else ''} on a device{fitted}",
        f"mesh       {' x '.join(f'{axis} {size}' for axis, size in sizes.items())}; remat {config.compute.remat}, "
        f"{config.compute.dtype}",
    ]
    idle = target.count - math.prod(sizes.values())
    return [*lines, f"           {idle} devices are left idle: give one mesh axis -1"] if idle else lines


def _memory_lines(v: Verdict) -> list[str]:
    formula, compiled = v.option.memory, v.compiled if v.tried is v.option else None
    lines = ["memory     of one device, GiB         formula" + ("   compiled" if compiled else "")]
    lines += [f"             {row:<22} {getattr(formula, row) / GIB:>9.2f}" for row in _MEMORY_ROWS]
    for row in ("arguments", "temporaries", "total"):
        real = f" {getattr(compiled, row) / GIB:>10.2f}" if compiled else ""
        lines.append(f"           {row:<24} {getattr(formula, row) / GIB:>9.2f}{real}")
    if v.compiled:
        peak = f", XLA's own peak {v.compiled.peak / GIB:.2f} GiB" if v.compiled.peak else ""
        found = ", ".join(f"{name} {count}" for name, count in v.compiled.collectives.items()) or "none"
        which = "" if v.tried is v.option else (
            f" with {' '.join(v.tried.overrides(v.config))}: {v.compiled.total / GIB:.2f} GiB (formula "
            f"{v.tried.memory.total / GIB:.2f}),")  # fmt: skip
        lines.append(f"compiled  {which} in {v.compiled.seconds:.0f} s, layers scanned, attention as a flash kernel"
                     f"{peak}; collectives in the program: {found}")  # fmt: skip
    else:
        lines.append(f"           not compiled: {v.why_not}")
    needed = (compiled.total if compiled else formula.total) / GIB
    room = f"{needed:.2f} of the {v.target.device.memory / GIB:.1f} GiB that can be used"
    verdict = "as it is NO, as planned here yes" if v.refused else "yes" if v.fits else "NO"
    return [*lines, f"fits       {verdict}: {room}"]


def _advice(v: Verdict) -> list[str]:
    """What fits, fastest first, by formula: the smallest number of micro-batches for each remat setting."""
    if not v.options:
        return [f"           nothing tried fits {v.target.count} of these: micro-batches of one row, full remat, all "
                "devices fsdp, tensor parallelism. Use more devices or a smaller model."]  # fmt: skip
    lines = [f"           the largest micro-batches that {'fit too' if v.fits else 'fit'}, fastest first, by formula:"]
    for option in v.options:
        changes = " ".join(option.overrides(v.config)) or "(as it is)"
        lines.append(f"           {option.memory.total / GIB:>7.1f} GiB {option.time.total:>8.3g} s a step  {changes}")
    return lines


def _time_lines(v: Verdict) -> list[str]:
    time, cost, device = v.option.time, v.cost, v.target.device
    parts = {"arithmetic": time.arithmetic, "memory traffic": time.memory_traffic,
             "communication beside it": time.overlapped, "communication between": time.exposed,
             "pipeline bubbles": time.bubble}  # fmt: skip
    shown = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds)
    return [
        f"step       {time.total:.3g} s at best, limited by {time.limit} ({shown})",
        f"run        {v.config.steps:,} steps: {cost.tokens_per_second:,.0f} tokens/s, "
        f"{cost.tokens_per_second * 86400 / 1e9:,.4g} billion a day, MFU {cost.mfu:.0%}, {duration(cost.days * 86400)}",
        f"cost       ${cost.dollars:,.2f}, {amount(cost.kilowatt_hours)} kWh, {amount(cost.carbon)} kg CO2 "
        f"({device.watts:g} W a device x {targets.OVERHEAD} for hosts and cooling)",
        f"           {MFU_CONVENTION}",
    ]


if __name__ == "__main__":
    sys.exit(main())
