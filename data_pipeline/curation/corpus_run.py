"""One run of the corpus command: the plan of it, and its steps from sources to files, in order.

Owns what is done when, by which tasks, and what is kept of it on disk. Knows neither the command line nor how a
filter, a step or a source works.
"""

import contextlib
import dataclasses
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.curation import account, cards, corpus_format, whole
from data_pipeline.curation.account import Counts
from data_pipeline.curation.curate import FilterPlan, FilterTask, filter_plans, filter_task, judge_shard
from data_pipeline.curation.download import (
    ReadResult,
    ReadTask,
    read_part,
    read_so_far,
    read_task,
    reads_head,
    shards_of,
)
from data_pipeline.curation.materialise import DropsTask, OutputTask, plan_outputs, write_drops, write_output
from data_pipeline.curation.shards import Facts, Shard, text_facts
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import WORK, code_version
from data_pipeline.engine.tasks import Executor
from data_pipeline.mixtures.load import mixture_mapping
from data_pipeline.mixtures.schema import MixtureConfig
from data_pipeline.sources import Input, Part, open_source
from data_pipeline.sources.dataset import DatasetConfig, brings_ids, format_of
from nanollama.data.files import DataError, into_place, sha256_file, sha256_json, write_atomic, write_json

STAGE_VERSION = 3  # raise it when the same inputs would give other bytes
CACHE = ".cache"
LISTED_INPUTS = 100  # a manifest names the inputs one by one up to this many
SHOWN_DROPS = 5  # bad rows printed per dataset; all are in dropped.jsonl


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done, all of it known before the first row is read."""

    mixture: MixtureConfig
    parts: list[list[tuple[Part, list[Input]]]]  # per dataset
    inputs: list[dict[str, Any]]  # per dataset, for the manifest
    filters: dict[str, tuple[FilterPlan, ...]]  # by dataset
    steps: tuple[whole.StepPlan, ...]
    head: dict[str, Any]  # of the manifest

    @classmethod
    def of(cls, mixture: MixtureConfig, file: str, shard_format: str) -> "Plan":
        parts = [[(part, part.inputs()) for part in open_source(dataset).parts()] for dataset in mixture.datasets]
        inputs = [_inputs([row for _, rows in own for row in rows]) for own in parts]
        filters = {dataset.name: filter_plans(dataset) for dataset in mixture.datasets}
        steps = tuple(plan for section in ("deduplication", "decontamination", "selection")
                      for plan in whole.step_plans(section, getattr(mixture, section)))
        head: dict[str, Any] = {
            "schema_version": corpus_format.SCHEMA_VERSION, "kind": "corpus", "fingerprint": "", "mixture": {
                "file": file, "sha256": sha256_json(mixture_mapping(mixture)), "config": mixture_mapping(mixture)
            }, "code": code_version(), "python": platform.python_version(), "format": shard_format
        }
        head["fingerprint"] = sha256_json({
            "stage": "corpus", "version": STAGE_VERSION, "mixture": head["mixture"]["sha256"], "format": shard_format,
            "inputs": [row["sha256"] for row in inputs], "steps": [plan.key for plan in steps],
            "filters": {name: [plan.key for plan in plans] for name, plans in filters.items()}
        })
        return cls(mixture, parts, inputs, filters, steps, head)


def _inputs(rows: Sequence[Input]) -> dict[str, Any]:
    digest = sha256_json([[row.path, row.bytes, row.sha256] for row in rows])
    result = {"count": len(rows), "bytes": sum(row.bytes for row in rows), "sha256": digest}
    if len(rows) <= LISTED_INPUTS:
        result["files"] = [dataclasses.asdict(row) for row in rows]
    return result


class Run:
    """One run of the command: where things are, and the steps."""

    def __init__(self, plan: Plan, output: Path, executor: Executor, progress: Progress):
        self.plan, self.output, self.executor, self.progress = plan, output, executor, progress
        self.datasets = plan.mixture.datasets
        self.decisions, self.cache = output / corpus_format.DECISIONS, output / CACHE
        self._shown: dict[str, int] = {}
        self._told: dict[str, str] = {}
        self._wanted = {dataset.name: (dataset.max_bytes or 0) + 1 for dataset in self.datasets if reads_head(dataset)}
        self._exhausted: dict[str, bool] = {}
        self._known: dict[str, account.Tally] = {}

    def download(self) -> list[Shard]:
        """Raw shards of all datasets, of capped heads as much as is wanted so far."""
        tasks, owners = self._read_tasks()
        results: dict[str, ReadResult] = {}
        self._read_heads({dataset.name: [tasks[key] for key in mine] for dataset, mine in owners
                          if reads_head(dataset)}, results)
        rest = [tasks[key] for key in dict.fromkeys(key for dataset, mine in owners for key in mine)
                if key not in results and not reads_head(tasks[key].dataset)]
        with _watched(rest, self.progress):
            for number, result in self.executor.run(read_part, rest):
                results[rest[number].key] = result
        shards: list[Shard] = []
        for dataset, mine in owners:
            first = len(shards)
            for key in mine:
                if key in results:
                    task = dataclasses.replace(tasks[key], dataset=dataset)  # two datasets may read the same part
                    shards += shards_of(task, results[key].markers, len(shards) - first)
            self._tell(dataset, [results[key] for key in mine if key in results], shards[first:])
        self.account(shards)
        return shards

    def _read_tasks(self) -> tuple[dict[str, ReadTask], list[tuple[DatasetConfig, list[str]]]]:
        tasks: dict[str, ReadTask] = {}
        owners = []
        for dataset, parts in zip(self.datasets, self.plan.parts, strict=True):
            mine = [read_task(dataset, part, inputs, self.cache / "raw") for part, inputs in parts]
            owners.append((dataset, [task.key for task in mine]))
            for task in mine:
                tasks.setdefault(task.key, task)
        return tasks, owners

    def _read_heads(self, heads: dict[str, list[ReadTask]], results: dict[str, ReadResult]) -> None:
        """Capped heads: each part by part and no further than wanted, all of them side by side."""
        left = {name: self._wanted[name] for name in heads}
        waiting = {name: list(tasks) for name, tasks in heads.items()}
        while names := [name for name in heads if waiting[name] and left[name] > 0]:
            tasks = [dataclasses.replace(waiting[name].pop(0), wanted=left[name]) for name in names]
            for number, result in self.executor.run(read_part, tasks):
                results[tasks[number].key] = result
                left[names[number]] -= sum(marker["bytes"] for marker in result.markers)
                self._exhausted[names[number]] = result.exhausted and not waiting[names[number]]

    def _tell(self, dataset: DatasetConfig, results: list[ReadResult], shards: list[Shard]) -> None:
        for text in [text for result in results for text in result.shown][:SHOWN_DROPS]:
            if self._shown.setdefault(dataset.name, 0) < SHOWN_DROPS:
                self._shown[dataset.name] += 1
                print(f"{dataset.name}: skipped {text}", file=sys.stderr)
        bad = sum(count for result in results for marker in result.markers for count in marker["bad"].values())
        if any(result.shown for result in results) and bad > SHOWN_DROPS:
            print(f"{dataset.name}: {bad:,} bad rows skipped in all, see {corpus_format.DROPPED}", file=sys.stderr)
        size = sum(marker["bytes"] for result in results for marker in result.markers)
        note = f"{sum(shard.rows for shard in shards):,} rows, {cards.size(size)}"
        if self._told.get(dataset.name) != note:  # of capped heads more may be read, of some of them
            self.progress.update(dataset.name, 1.0, note, force=True)
        self._told[dataset.name] = note

    def curate(self) -> list[Shard]:
        """Shards after filters, duplicates and decontamination."""
        while True:
            shards = self._filter(self.download())
            if not self._read_on(shards):
                break
        self.account(shards)
        shards = whole.drop_repeated_ids(shards, self.datasets, self.decisions)
        self._stop_at_repeated_ids(shards)
        shards = whole.drop_repeated_texts(shards, self.datasets, self.decisions)
        return self.steps(shards, ("deduplication", "decontamination"))

    def _filter(self, shards: list[Shard]) -> list[Shard]:
        made = [filter_task(shard, self.plan.filters[shard.dataset], self.decisions, self.cache / "texts")
                for shard in shards]
        filtering = [task for task, _ in made if task.plans]
        # what steps prepare takes one process some seconds: while the others filter, nobody waits for it
        tasks = [*whole.prepare_tasks(self.plan.steps, self.cache), *filtering]
        sizes = [0] * (len(tasks) - len(filtering)) + [task.shard.rows for task in filtering]
        for _, _ in self._shown_run("filtering", _prepare_or_judge, tasks, sizes):
            pass
        return [after for _, after in made]

    def _read_on(self, shards: list[Shard]) -> bool:
        """Whether a capped head lost so much to its filters that more of it must be read."""
        more = False
        for dataset in self.datasets:
            if not reads_head(dataset) or self._exhausted[dataset.name] or dataset.max_bytes is None:
                continue
            mine = [shard for shard in shards if shard.dataset == dataset.name]
            kept = sum(int(text_facts(shard).bytes.sum()) for shard in mine)
            if kept <= dataset.max_bytes:
                raw = self._wanted[dataset.name]
                factor = min(4.0, 1.2 * dataset.max_bytes / max(kept, 1))
                self._wanted[dataset.name] = max(raw + 1, int(raw * max(factor, 1.05)))
                more = True
        return more

    def _stop_at_repeated_ids(self, shards: list[Shard]) -> None:
        for dataset in self.datasets:
            if dataset.on_error == "stop" and brings_ids(dataset):
                mine = [shard for shard in shards if shard.dataset == dataset.name]
                counts = account.count(dataset, mine, self._known)
                if counts.dropped.get(whole.DUPLICATE_ID):
                    raise DataError(f"dataset {dataset.name}: {counts.dropped[whole.DUPLICATE_ID]} documents have an "
                                    f"id ({dataset.id_field or 'WARC-Record-ID'}) that came before. Mend the rows, or "
                                    "set on_error: skip.")

    def steps(self, shards: list[Shard], sections: tuple[str, ...]) -> list[Shard]:
        """Shards after the whole-corpus steps of `sections`."""
        for plan in [plan for plan in self.plan.steps if plan.section in sections]:
            done = 0

            def report(name: str = plan.type, total: int = len(shards)) -> None:
                nonlocal done
                done += 1
                self.progress.update(name, done / total, f"{done} of {total} shards")

            shards = whole.run_step(plan, shards, self.datasets, self.executor, self.decisions, self.cache, report)
            self.progress.update(plan.type, 1.0, f"{len(shards)} shards", force=True)
            self.account(shards)
        return shards

    def account(self, shards: list[Shard]) -> list[Counts]:
        """Counts per dataset, checked."""
        return [account.count(dataset, [shard for shard in shards if shard.dataset == dataset.name], self._known)
                for dataset in self.datasets]

    def sizes(self, shards: list[Shard], counts: list[Counts]) -> list[OutputTask]:
        """The files to write; bytes and characters of what is kept are added to `counts`."""
        owners = {dataset.name: own for dataset, own in zip(self.datasets, counts, strict=True)}

        def facts() -> Iterator[tuple[Shard, Facts]]:
            for shard in shards:  # one at a time: all together would not fit for a large corpus
                one = text_facts(shard)
                owners[shard.dataset].bytes += int(one.bytes.sum())
                owners[shard.dataset].characters += int(one.characters.sum())
                yield shard, one

        origins = any(format_of(dataset) == "docstrings" for dataset in self.datasets)
        return plan_outputs(facts(), self.cache / "corpus", origins, self.plan.head["format"])

    def finish(self, shards: list[Shard], outputs: list[OutputTask], manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the documents, move them into place, the manifest last. The earlier corpus is whole until then."""
        if sum(row["kept"] for row in manifest["datasets"]) == 0:
            raise DataError(
                f"{self.output}: the corpus is empty: no document of any dataset was kept.\n"
                f"{cards.drops_table(manifest)}\nCheck text_field, format and filters of the mixture.")
        drops = [DropsTask(shard, str(self.cache / "drops" / f"{shard.key[:32]}.jsonl"), self._rows_path(shard))
                 for shard in shards]
        written: dict[int, dict[str, Any]] = {}
        for number, result in self._shown_run("writing", write_output, outputs, [1] * len(outputs)):
            written[number] = result
        for _ in self.executor.run(write_drops, drops):
            pass
        (self.output / corpus_format.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.output / corpus_format.SHARDS, ignore_errors=True)
        (self.output / corpus_format.SHARDS).mkdir(parents=True)
        for number, task in enumerate(outputs):
            name = f"{corpus_format.SHARDS}/part-{number:05d}.{self.plan.head['format']}"
            os.replace(task.path, self.output / name)
            manifest["shards"].append({"path": name, "dataset": task.dataset, **written[number]})
        dropped = self.output / corpus_format.DROPPED
        _joined([Path(task.path) for task in drops], dropped)
        manifest["dropped"] = {"path": corpus_format.DROPPED, "sha256": sha256_file(dropped)}
        write_json(self.output / corpus_format.INDEX, self._index(shards))
        manifest["decisions"] = {"path": corpus_format.INDEX, "sha256": sha256_file(self.output / corpus_format.INDEX)}
        manifest["steps"] = [plan.account(self.cache) for plan in self.plan.steps]
        write_atomic(self.output / corpus_format.CARD, cards.corpus_card(manifest))
        self._tidy(shards)
        write_json(self.output / corpus_format.MANIFEST, manifest)
        return manifest

    def _index(self, shards: list[Shard]) -> dict[str, Any]:
        """Where the decisions about every document are, for `data_pipeline.explain`."""
        def relative(path: str) -> str:
            return os.path.relpath(path, self.output)

        return {"schema_version": 1, "shards": [
            {"dataset": shard.dataset, "number": shard.number, "rows": relative(self._rows_path(shard)),
             "stages": [{"stage": sidecar.stage, "section": sidecar.section, "path": relative(sidecar.path)}
                        for sidecar in shard.sidecars]}
            for shard in shards]}

    def _rows_path(self, shard: Shard) -> str:
        """Where the rows of a raw shard are described; named by the shard."""
        raw = Path(shard.path)
        name = f"rows-{raw.parent.name[:16]}-{raw.stem}.parquet"
        return str(self.decisions / shard.dataset / f"{shard.number:05d}" / name)

    def _tidy(self, shards: list[Shard]) -> None:
        """Remove what this corpus was not made from, and what can only be used once."""
        sidecars = [sidecar for shard in shards for sidecar in shard.sidecars]
        kept = {Path(sidecar.path) for sidecar in sidecars} | {self.output / corpus_format.INDEX}
        kept |= {Path(self._rows_path(shard)) for shard in shards}
        kept |= {Path(sidecar.texts) for sidecar in sidecars if sidecar.texts}
        kept |= {Path(shard.path).with_suffix(suffix) for shard in shards for suffix in (".parquet", ".json")}
        for plan in self.plan.steps:
            kept |= set(plan.prepared(self.cache).rglob("*"))
        for root in (self.decisions, self.cache):
            for path in sorted(root.rglob("*"), reverse=True):
                if path.is_dir():
                    with contextlib.suppress(OSError):
                        path.rmdir()
                elif path not in kept:
                    path.unlink(missing_ok=True)
        shutil.rmtree(self.output / WORK, ignore_errors=True)  # of earlier versions

    def _shown_run(self, label: str, function: Callable[[Any], Any], tasks: Sequence[Any],
                   sizes: Sequence[int]) -> Iterator[tuple[int, Any]]:
        done = 0
        for number, result in self.executor.run(function, tasks):
            done += sizes[number]
            self.progress.update(label, done / max(1, sum(sizes)), f"{done:,} of {sum(sizes):,}")
            yield number, result


def _prepare_or_judge(task: whole.PrepareTask | FilterTask) -> None:
    if isinstance(task, whole.PrepareTask):
        whole.prepare(task)
    else:
        judge_shard(task)


@contextlib.contextmanager
def _watched(tasks: list[ReadTask], progress: Progress) -> Iterator[None]:
    """While tasks are read somewhere, show how far the markers of finished shards are."""
    total = sum(task.part.bytes for task in tasks)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(2.0):
            done = sum(read_so_far(task) for task in tasks)
            progress.update("reading", min(1.0, done / total) if total else None, cards.size(done))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _joined(parts: Sequence[Path], target: Path) -> None:
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as joined:
        for path in parts:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, joined)
    into_place(temporary, target)
