"""`python -m nanollama.run --pipeline=FILE --workdir=DIR`: a chain of commands, each done once.

Owns the order of the stages, their attempts, the go/no-go gates between them and what the reader sees. Knows
nothing of what a stage does: a stage is a command with inputs and outputs, in a process of its own. When a
stage counts as done is written in `nanollama.stages`.
"""

import argparse
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanollama.data.files import DataError, Lock, read_json
from nanollama.data.strict import FieldError, nearest
from nanollama.quantities import duration
from nanollama.stages import Gate, Run, Stage, load_pipeline, this_python
from nanollama.supervise import kill_left_over, supervise

NO_GO = 3  # exit code when a gate says stop


def run_pipeline(run: Run, again: str, first: str = "", force: Sequence[str] = ()) -> int:
    """Bring every stage from `first` on to done, in order; returns the exit code. `again` is this command."""
    stages = run.pipeline.stages
    for stage in stages:
        marker = run.marker(stage)
        if marker.get("state") == "running":  # killed by kill -9: we must not meet its remains
            kill_left_over(marker["token"])
    skipped = [stage.name for stage in stages].index(first) if first else 0
    for index, stage in enumerate(stages):
        title = f"[{index + 1}/{len(stages)}] {stage.name}"
        if index < skipped:
            print(f"{title}: taken as it is (--from {first})")
            continue
        key = run.key(stage)
        if stage.name not in force and run.is_done(stage, key):
            print(f"{title}: done before, in {duration(run.marker(stage)['seconds'])}")
        else:
            print(f"{title}: {stage.about}\n  $ {shlex.join(run.command(stage))}", flush=True)
            code = run_stage(run, stage, key, again, anew=stage.name in force)
            if code:
                return code
            print(f"{title}: done in {duration(run.marker(stage)['seconds'])}", flush=True)
        if stage.gate and not passes(run, stage, stage.gate):
            return NO_GO
    _close(run)
    return 0


def run_stage(run: Run, stage: Stage, key: str, again: str, anew: bool) -> int:
    """One attempt at a stage; its marker says at every moment how far it is. Returns the exit code."""
    before = run.marker(stage)
    continued = before.get("key") == key and not anew
    if before and not continued and stage.continues:
        _move_aside(Path(run.fill(stage.continues)))
    resumed = continued and before["state"] != "done"
    earlier, begin = before["seconds"] if resumed else 0.0, time.monotonic()
    marker = {
        "stage": stage.name,
        "state": "running",
        "key": key,
        "command": run.command(stage),
        "started": before["started"] if resumed else _now(),
        "seconds": earlier,
        "attempts": before["attempts"] + 1 if resumed else 1,
        "token": uuid.uuid4().hex,
    }

    def save(**changes: Any) -> None:
        marker.update(changes, seconds=round(earlier + time.monotonic() - begin, 3))
        run.save(stage, marker)

    save()
    log = run.folder / f"{stage.name}.log"
    try:
        outcome = supervise(run.command(stage), log=log, token=str(marker["token"]), tick=save)
    except FileNotFoundError as error:
        save(state="failed")
        raise DataError(
            f"stage {stage.name!r}: no program {error.filename!r}. Correct its command."
        ) from error
    if outcome.stopped_by:
        save(state="stopped")
        print(f"\nStopped in stage {stage.name!r}. Go on with:\n  {again}", flush=True)
        return 128 + outcome.stopped_by
    outputs = run.output_hashes(stage)
    missing = [run.fill(text) for text, digest in outputs.items() if digest is None]
    if outcome.code or missing:
        save(state="failed", code=outcome.code)
        reason = f"failed with exit code {outcome.code}"
        if not outcome.code:
            reason = f"ended well, but did not make {', '.join(missing)}"
        lines = "\n".join(f"  | {line}" for line in outcome.last_lines)
        print(
            f"\nStage {stage.name!r} {reason}. Its last lines (all of them: {log}):\n{lines}\n"
            f"To try it alone:\n  {shlex.join(run.command(stage))}\nTo go on:\n  {again}",
            flush=True,
        )
        return outcome.code or 1
    save(state="done", code=0, outputs=outputs, ended=_now())
    return 0


def passes(run: Run, stage: Stage, gate: Gate) -> bool:
    """Print and return whether the gate lets us go on. Errors: DataError when the figure is not there."""
    value: Any = read_json(run.fill(gate.file))
    for name in gate.field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise DataError(
                f"gate of stage {stage.name!r}: no field {gate.field!r} in {run.fill(gate.file)}. "
                + nearest(name, list(value) if isinstance(value, dict) else [])
            )
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(
            f"gate of stage {stage.name!r}: {gate.field} is {value!r}, not a number. Correct its field."
        )
    low = gate.min is None or value >= gate.min
    high = gate.max is None or value <= gate.max
    bounds = " and ".join(
        f"{word} {bound:g}"
        for word, bound in (("at least", gate.min), ("at most", gate.max))
        if bound is not None
    )
    print(
        f"  gate: {gate.field} is {value:.6g}, must be {bounds}: {'go' if low and high else 'NO GO'}",
        flush=True,
    )
    if not (low and high):
        print(
            f"Stopped after stage {stage.name!r}: the gate says no. Change the run's config, or the gate in "
            "the pipeline file, and run the same command again.",
            flush=True,
        )
    return low and high


def describe(run: Run) -> None:
    """Print every stage with its state and command; runs nothing."""
    for index, stage in enumerate(run.pipeline.stages):
        try:
            marker, done = run.marker(stage), run.is_done(stage, run.key(stage))
            state = f"done in {duration(marker['seconds'])}" if done else marker.get("state", "to do")
            state = "to do again: inputs or outputs changed" if state == "done" else state
        except DataError:
            state = "waits for an earlier stage"
        print(f"[{index + 1}/{len(run.pipeline.stages)}] {stage.name}: {stage.about} ({state})")
        print(f"  $ {shlex.join(run.command(stage))}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollama.run", description="Run a chain of stages, each once."
    )
    parser.add_argument(
        "--pipeline", required=True, help="pipeline file, e.g. configs/pipelines/quickstart.py[:arg]"
    )
    parser.add_argument("--workdir", required=True, help="where everything is written, e.g. runs/quickstart")
    parser.add_argument(
        "--list", action="store_true", help="print the stages, their state and commands; run nothing"
    )
    parser.add_argument(
        "--from", dest="first", default="", metavar="STAGE", help="take the stages before it as they are"
    )
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="run it though it is done"
    )
    options = parser.parse_args(arguments)
    again = shlex.join(
        [
            this_python(),
            "-m",
            "nanollama.run",
            f"--pipeline={options.pipeline}",
            f"--workdir={options.workdir}",
        ]
    )
    try:
        run = Run(load_pipeline(options.pipeline), Path(options.workdir))
        names = [stage.name for stage in run.pipeline.stages]
        for name in filter(None, [options.first, *options.force]):
            if name not in names:
                raise FieldError("--from/--force", f"no stage {name!r}", nearest(name, names))
        if options.list:
            describe(run)
            return 0
        with Lock(run.workdir):
            return run_pipeline(run, again, options.first, options.force)
    except (DataError, FieldError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nStopped between two stages. Go on with:\n  {again}")
        return 130


def _close(run: Run) -> None:
    total = sum(run.marker(stage).get("seconds", 0.0) for stage in run.pipeline.stages)
    print(f"\nAll {len(run.pipeline.stages)} stages are done: {duration(total)} of work.")
    if run.pipeline.report:
        print(f"Report: {run.fill(run.pipeline.report)}")
    if run.pipeline.then:
        print(f"Next:   {shlex.join(run.fill(part) for part in run.pipeline.then)}")


def _move_aside(path: Path) -> None:
    """What was made under another key is kept beside, the newest only."""
    if path.exists():
        aside = path.with_name(f"{path.name}.before")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print(f"  (inputs changed: the earlier {path} is now {aside})", flush=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    sys.exit(main())
