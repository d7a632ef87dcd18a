"""`python -m nanollama.train --config=configs/phase1.py`: the training loop, top to bottom.

Owns the order of things: check everything, build, restore, loop, save, evaluate. Each part lives elsewhere.
A step's figures are read while the next step runs, so the device never waits for the host.
"""

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from nanollama import config_files
from nanollama.config import Config, ConfigError, as_dict
from nanollama.data.files import DataError, Lock, read_json
from nanollama.data.loader import Loader
from nanollama.data.mixture import open_mixture
from nanollama.data.tokenizer_folder import copy_tokenizer, load_tokenizer
from nanollama.experiments import run_folder
from nanollama.models.accounting import count_parameters, flops_per_token
from nanollama.models.decoder import Decoder
from nanollama.models.lora import learned
from nanollama.parallel import backend, distributed
from nanollama.parallel.mesh import make_mesh, one_device, process_block
from nanollama.parallel.team import Team, TeamError
from nanollama.planning import here
from nanollama.planning.knobs import with_micro_batches
from nanollama.training import elastic, initial
from nanollama.training import step as same_mesh
from nanollama.training.checkpoint import Checkpoints
from nanollama.training.metrics import MetricsLog, NoLog
from nanollama.training.optim import make_optimizer
from nanollama.training.samples import Sampler
from nanollama.training.state import abstract_state, state_shardings
from nanollama.training.stop import StopSignal
from nanollama.training.throughput import Throughput, total_peak
from nanollama.training.validation import Validation
from nanollama.training.watch import NotFinite, Watch


def train(config: Config, workdir: Path, *, resume: bool = False, given: str = "", team: Team | None = None) -> bool:
    """Train to `config.steps`: True when that was reached, False when asked to stop before (and saved).

    team: the processes of this run, all of which call this with the same arguments; the first one writes.
    Errors: ConfigError and DataError before any work is done, NotFinite during it.
    """
    team = Team() if team is None else team
    say = print if team.first else _quiet
    config = initial.with_new_rows(config, workdir)
    say(describe(config), flush=True)
    mesh = make_mesh(config.mesh)
    config = fitted(config, workdir, mesh, team)
    if warning := here.check_memory(config, mesh.size):
        say(warning, flush=True)
    mixture = open_mixture(config.data, split="train", vocab_size=config.model.vocab_size)
    mine, blocks = process_block(mesh)  # processes that share rows (tensor, context) read the same ones
    loader = Loader(mixture, seed=config.seed, global_batch=config.batch.global_rows, host=mine, hosts=blocks)
    read = [member.packed.dataset_id for member in mixture.sets]
    for process, other in enumerate(team.exchange(read)):
        if other != read:
            raise DataError(f"process {process} reads the packed sets {other}, process {team.process} {read}: copy the "
                            "same sets to every host, or put them where all hosts see them.")
    decoder, optimizer = Decoder(config.model, config.compute, config.lora), make_optimizer(config)
    steps, whole = (elastic, one_device(mesh)) if config.determinism == "elastic" else (same_mesh, mesh)
    validation = Validation(config, decoder, whole) if config.evaluation.every else None
    train_step = steps.make_train_step(config, decoder, optimizer, mesh, state_shardings(config, optimizer, mesh))

    with contextlib.ExitStack() as stack:
        if team.first:
            stack.enter_context(Lock(workdir))
        stop = stack.enter_context(StopSignal())
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        stack.callback(checkpoints.close)
        start, done, parent = 0, False, None
        if team.first:
            start = starting_step(workdir, checkpoints, resume)
            done = start >= config.steps and finished(workdir, start)
            if not done:
                parent = None if start else initial.find_parent(config, mixture.tokenizer)
                run_folder.prepare(workdir, config, step=start, given=given, parent=parent)
                copy_tokenizer(config.data.tokenizer, workdir / "tokenizer")
        start, done, parent = team.exchange([start, done, parent])[0]
        if done:
            say(f"{workdir}: done at step {start}")
            return True
        tokenizer = load_tokenizer(workdir / "tokenizer")

        # 1. The state: from the newest good checkpoint, from another run's, or born sharded.
        source_tokens = np.zeros(len(loader.sources), np.int64)
        if start:
            state, saved = initial.resumed(checkpoints, start, config, optimizer, mesh)
            mixture.require_same(saved["mixture"], f"checkpoint {start} of {workdir}")
            source_tokens += saved["source_tokens"]
            parent = saved.get("parent")
        else:
            state = initial.fresh(config, optimizer, mesh)

        # 2. What watches it.
        peak, convention = total_peak(mesh.devices.ravel().tolist(), config.compute.dtype)
        flops = flops_per_token(config.model, config.data.sequence_length).train
        speed = Throughput(steps=config.steps, flops_per_token=flops, peak=peak)
        log = MetricsLog(
            workdir, config.logging, resume_step=start, steps=config.steps, convention=convention, name=config.name
        ) if team.first else NoLog()
        stack.callback(log.close)
        watch = Watch(config, log, speed, loader, checkpoints, source_tokens)
        sampler = Sampler(config, tokenizer, whole, workdir / "samples")
        if team.processes > 1 and config.logging.sample_prompts:
            say("samples are written by runs of one process only: nanollama.generate writes them from a checkpoint")
        metadata = {"config": as_dict(config), "tokenizer": tokenizer.sha256, "mixture": mixture.describe(),
                    "parent": parent}

        if steps is same_mesh and start < config.steps:
            first = steps.put_batch(loader.batch(start).arrays, config, mesh)
            train_step = same_mesh.compile_step(train_step, state, first)
        team.exchange("compiled")  # all, before any runs: at a first collective gloo waits for others 30 s only

        # 3. The loop: dispatch a step, read the figures of the one before; save before evaluating.
        stack.enter_context(jax.transfer_guard("disallow"))
        for step, batch in zip(range(start + 1, config.steps + 1), loader.iterate(start), strict=False):
            state, scalars = train_step(state, steps.put_batch(batch.arrays, config, mesh))
            # What one process knows and all must: whether to stop, and the labels that each read.
            known = team.exchange([stop.requested, mine, batch.source_tokens.tolist()])
            stopping = next((signal.Signals(number) for number, _, _ in known if number), None)
            of_blocks = {block: tokens for _, block, tokens in known}
            watch.dispatched(step, scalars, np.sum(list(of_blocks.values()), axis=0))
            checkpoints.check()
            if stopping or step == config.steps or step % config.checkpoint.every == 0:
                watch.catch_up()  # raises before a state that is not finite can be saved
                checkpoints.save(step, initial.own(state), {**metadata, "source_tokens": watch.source_tokens.tolist()})
            if step == config.steps:
                break
            if stopping:
                log.event(step, f"{stopping.name}: saved and stopped; --resume goes on", event="stopped")
                return False
            with speed.pause():
                if validation and step % config.evaluation.every == 0:
                    watch.catch_up()
                    log.validation(step, validation.run(state.params))
                if team.processes == 1 and config.logging.sample_every and step % config.logging.sample_every == 0:
                    watch.catch_up()
                    print(sampler.write(step, state.params), end="", flush=True)

        # 4. The end: the last checkpoint is on disk before anything is said about it.
        checkpoints.wait()
        figures = validation.run(state.params) if validation else {}
        if figures:
            log.validation(config.steps, figures)
        if team.processes == 1:
            print(sampler.write(config.steps, state.params), end="", flush=True)
        if team.first:
            run_folder.add_result(workdir, "training", {"step": config.steps, "validation": figures})
    return True


def fitted(config: Config, workdir: Path, mesh: Mesh, team: Team) -> Config:
    """`config` with as many micro-batches as the devices' memory asks for, where it leaves that open; all agree."""
    if config.batch.micro_batches:
        return config
    mine = run_folder.micro_batches_before(workdir, config) or here.fewest_micro_batches(config, mesh.size)
    most = max(team.exchange(mine))
    if team.first:
        print(f"micro-batches: {most}, the fewest that fit the devices' memory (batch.micro_batches=0)", flush=True)
    return with_micro_batches(config, most)


def _quiet(*_: object, **__: object) -> None:
    """What the other processes do with what the first one prints."""


def starting_step(workdir: Path, checkpoints: Checkpoints, resume: bool) -> int:
    """Step of the newest good checkpoint, 0 where there is none. Errors: DataError where going on was not asked for."""
    start = checkpoints.latest() or 0
    if start and not resume:
        raise DataError(
            f"{workdir}: holds a run at step {start}. Add --resume to go on with it, or choose another --workdir."
        )
    return start


def finished(workdir: Path, step: int) -> bool:
    """Whether results.json has the figures of `step`: nothing is left to do."""
    path = workdir / "results.json"
    return path.is_file() and read_json(path).get("training", {}).get("step") == step


def describe(config: Config) -> str:
    """What the run is and needs, from shapes alone: nothing is allocated."""
    state = abstract_state(config, make_optimizer(config))
    size = {name: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(part))
            for name, part in (("parameters", state.params), ("optimizer", state.opt_state))}
    rows, length = config.batch.global_rows, config.data.sequence_length
    count = count_parameters(config.model)
    flops = flops_per_token(config.model, length).train
    tokens = rows * length * config.steps
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(learned(state.params)))
    what = "gradients as much as the parameters" if config.lora is None else f"{trained:,} values are trained"
    if config.lora is not None and config.lora.train_rows_from:
        what += f", rows of new tokens among them (from id {config.lora.train_rows_from:,} on)"
    return "\n".join([
        f"{config.name}: {config.model.family}, {count.total:,} parameters ({count.non_embedding:,} without the "
        "embedding)",
        f"state: parameters {size['parameters'] / 2**20:,.0f} MiB, optimizer {size['optimizer'] / 2**20:,.0f} MiB; "
        f"{what}",
        f"{config.steps:,} steps of {rows} x {length} = {tokens:,} tokens, {flops / 1e9:.3g} GFLOP each, "
        f"{flops * tokens:.3g} FLOP in all",
    ])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done or stopped and saved, 2 refused, 3 not finite, 4 out of memory."""
    parser = argparse.ArgumentParser(
        prog="python -m nanollama.train", description="Train a model from a config file.",
        epilog="Any field of the config can be given: --config.optimizer.learning_rate=1e-3")
    parser.add_argument("--config", required=True, help="path.py or path.py:argument, e.g. configs/phase1.py:runlocal")
    parser.add_argument("--workdir", type=Path, help="run folder; default runs/<name of the config>")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in the run folder")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of this process, for trying meshes")
    several = parser.add_argument_group("several processes (found by themselves under SLURM, Kubernetes, TPU pods)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, help="how many there are")
    several.add_argument("--process", type=int, help="which one this is, from 0")
    several.add_argument("--join-timeout", type=float, default=300.0, help="seconds to wait for all (%(default)s)")
    options, rest = parser.parse_known_args(arguments)
    try:
        overrides = config_files.overrides(rest)
        config = config_files.load(options.config, overrides)
        workdir, given = options.workdir or Path("runs") / config.name, run_folder.as_given(options.config, overrides)
        place = distributed.find(options.coordinator, options.processes, options.process)
        with distributed.join(place, run_folder.facts(config), options.join_timeout) as team:
            elastic_mode = config.determinism == "elastic"
            backend.start(elastic=elastic_mode, devices=options.devices, processes=team.processes)
            train(config, workdir, resume=options.resume, given=given, team=team)
    except (ConfigError, DataError, TeamError, backend.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Exception as error:  # XlaRuntimeError has no public name that all versions share
        if not here.out_of_memory(error):
            raise
        print(f"error: {here.explain(config, jax.device_count(), error)}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    backend.use_huge_pages()
    sys.exit(main())
