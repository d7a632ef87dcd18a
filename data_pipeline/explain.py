"""`python -m data_pipeline.explain DOC_ID --corpus=DIR`: everything that was decided about one document, and why.

Also from the other end: `--run=DIR --step=N --row=R` names the documents of a row that a training step saw, and
explains each. Owns the way from a training row to the source, and its wording. Reads what the corpus command, packing
and training left in their folders; decides nothing.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from data_pipeline.curation import corpus_format
from data_pipeline.curation.corpus_format import read_manifest
from data_pipeline.curation.shards import read_columns
from data_pipeline.engine.stage import command
from nanollama.data.files import DataError, read_json, sha256_file
from nanollama.data.origin import row_origin
from nanollama.data.packed import DOCUMENTS_FILE, PackedSet

COPIES_SHOWN = 10
SIMILARITIES = ("jaccard", "distance")  # what steps measure between a copy and its original


class Corpus:
    """A finished corpus directory and what it knows of its documents."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.manifest, self.sha256 = read_manifest(directory)
        path = self.directory / corpus_format.INDEX
        if not path.is_file():
            raise DataError(f"{path}: missing, so nothing says what was decided. Run data_pipeline.corpus again on "
                            f"{directory}.")
        wanted = self.manifest.get("decisions", {}).get("sha256")
        if sha256_file(path) != wanted:
            raise DataError(f"{path}: is not the one of this corpus (its SHA-256 is not {wanted}). Delete "
                            f"{self.directory / corpus_format.MANIFEST} and run data_pipeline.corpus again.")
        self.shards: list[dict[str, Any]] = read_json(path)["shards"]

    def explain(self, doc_id: str) -> dict[str, Any]:
        """What is known of the document `doc_id` ("dataset/id", or for a broken row "dataset/place"). Errors:
        DataError when no row is called so."""
        dataset, _, name = doc_id.partition("/")
        names = [row["name"] for row in self.manifest["datasets"]]
        if dataset not in names:
            raise DataError(f"{doc_id}: no dataset of {self.directory} is called {dataset!r}; ids are DATASET/ID, "
                            f"datasets are {', '.join(names)}.")
        before = 0
        for shard in self.shards:
            if shard["dataset"] != dataset:
                continue
            row = self._find(shard, name)
            if row is not None:
                return self._row(doc_id, shard, row, before)
            before += self._alive(shard)
        raise DataError(f"{doc_id}: no row of dataset {dataset} has that id or place. Ids of kept documents are in "
                        f"{self.directory}/{corpus_format.SHARDS}, those of dropped ones in {corpus_format.DROPPED}.")

    def _find(self, shard: dict[str, Any], name: str) -> int | None:
        table = read_columns(str(self.directory / shard["rows"]), ["id", "place"])
        for column in ("id", "place"):
            found = pyarrow.compute.index(table.column(column), name).as_py()
            if found >= 0:
                return int(found)
        return None

    def _alive(self, shard: dict[str, Any]) -> int:
        last = shard["stages"][-1]["path"] if shard["stages"] else shard["rows"]
        return int(read_columns(str(self.directory / last), ["reason"]).column("reason").null_count)

    def _row(self, doc_id: str, shard: dict[str, Any], row: int, before: int) -> dict[str, Any]:
        raw = read_columns(str(self.directory / shard["rows"])).slice(row, 1).to_pylist()[0]
        settings = next(one for one in self.manifest["mixture"]["config"]["datasets"]
                        if one["name"] == shard["dataset"])
        result: dict[str, Any] = {
            "doc_id": doc_id, "source": {"dataset": shard["dataset"], "from": settings["source"],
                                         "place": raw["place"], "licence": settings["licence"],
                                         "input": self._input(shard["dataset"], raw["place"])},
            "date": raw["date"], "bytes": raw["bytes"], "characters": raw["characters"],
            "meta": json.loads(raw["meta"] or "{}"), "stages": [],
        }
        reason = raw["reason"]
        result["stages"].append({"stage": "read", "section": "read", "verdict": _verdict(reason),
                                 "facts": {"detail": raw["detail"]} if raw["detail"] else {}})
        alive = reason is None
        position = 0
        for stage in shard["stages"]:
            told, position = self._stage(stage, row) if alive else (None, 0)
            if told is None:
                result["stages"].append({"stage": stage["stage"], "section": stage["section"],
                                         "verdict": "not reached", "facts": {}})
                continue
            result["stages"].append(told)
            alive = told["verdict"] == "kept"
        result["kept"] = alive
        result["weight"] = {"dataset": settings["mix_ratio"], **{
            key: value for stage in result["stages"] for key, value in stage["facts"].items() if key == "weight"}}
        if alive:
            if not shard["stages"]:
                reasons = read_columns(str(self.directory / shard["rows"]), ["reason"]).column("reason")
                position = int(np.count_nonzero(np.asarray(reasons.is_null())[:row]))
            result["corpus"] = self._line(shard["dataset"], before + position)
        result["copies_dropped"] = list(self._copies(doc_id))
        return result

    def _stage(self, stage: dict[str, Any], row: int) -> tuple[dict[str, Any] | None, int]:
        """(what a stage said of a row, how many rows before it were kept)."""
        table = read_columns(str(self.directory / stage["path"]))
        rows = np.asarray(table.column("row"))
        at = int(np.searchsorted(rows, row))
        if at == len(rows) or rows[at] != row:
            return None, 0
        facts = table.slice(at, 1).to_pylist()[0]
        reason = facts.pop("reason")
        facts.pop("row")
        kept = int(np.count_nonzero(np.asarray(table.column("reason").is_null())[:at]))
        return {"stage": stage["stage"], "section": stage["section"],
                "verdict": _verdict(reason),
                "facts": {key: value for key, value in facts.items() if value is not None}}, kept

    def _input(self, dataset: str, place: str) -> dict[str, Any] | None:
        row = next(one for one in self.manifest["datasets"] if one["name"] == dataset)
        files = [one for one in row["inputs"].get("files", []) if place.startswith(one["path"])]
        return max(files, key=lambda one: len(one["path"])) if files else None

    def _line(self, dataset: str, number: int) -> dict[str, Any]:
        """File and line (of Parquet: row), from 1, of the dataset's document `number`, from 0."""
        for shard in self.manifest["shards"]:
            if shard["dataset"] == dataset:
                if number < shard["documents"]:
                    return {"path": shard["path"], "line": number + 1}
                number -= shard["documents"]
        raise DataError(f"{self.directory}: the decisions name more documents of {dataset} than the shards hold. "
                        f"Delete {corpus_format.MANIFEST} there and run data_pipeline.corpus again.")

    def _copies(self, doc_id: str) -> Iterator[dict[str, Any]]:
        """Documents dropped because they are copies of this one."""
        for shard in self.shards:
            for stage in shard["stages"]:
                path = str(self.directory / stage["path"])
                if "duplicate_of" not in pyarrow.parquet.read_schema(path).names:
                    continue
                table = read_columns(path)
                hits = table.filter(pyarrow.compute.equal(table.column("duplicate_of"), doc_id))
                if not len(hits):
                    continue
                ids = read_columns(str(self.directory / shard["rows"]), ["id"]).column("id")
                for one in hits.to_pylist():
                    measured = {key: one[key] for key in SIMILARITIES if one.get(key) is not None}
                    yield {"doc_id": f"{shard['dataset']}/{ids[one['row']].as_py()}", "stage": stage["stage"],
                           **measured}


def packed_position(packed: str | os.PathLike[str], doc_id: str) -> dict[str, Any] | None:
    """Split, record and segment of a document in a packed set; None when it is not there."""
    directory = PackedSet(packed).directory
    found = pyarrow.parquet.read_table(directory / DOCUMENTS_FILE, filters=[("doc_id", "=", doc_id)]).to_pylist()
    if not found:
        return None
    return {"packed": str(directory), **{key: found[0][key] for key in ("split", "record", "segment", "tokens", "doc")}}


def explain_row(run: str | os.PathLike[str], step: int, row: int) -> list[dict[str, Any]]:
    """For each document of row `row` of the batch of training step `step`: where it is, and all that is known of it.

    Errors: DataError, when a folder on the way is gone, or is not the one the run read.
    """
    result = []
    corpora: dict[Path, Corpus] = {}
    for place in row_origin(run, step, row):
        packed = PackedSet(place["set"])
        directory = packed.directory / packed.manifest["corpus"]["path"]
        if directory not in corpora:
            corpus = Corpus(directory)
            if corpus.sha256 != packed.manifest["corpus"]["manifest_sha256"]:
                raise DataError(f"{packed.directory}: was packed from another corpus than the one that is in "
                                f"{directory} now (manifest {corpus.sha256[:16]}, packed from "
                                f"{packed.manifest['corpus']['manifest_sha256'][:16]}). Put that one back.")
            corpora[directory] = corpus
        told = corpora[directory].explain(place["doc_id"])
        told["packed"] = packed_position(packed.directory, place["doc_id"])
        told["row"] = {"step": step, "row": row, **{key: place[key] for key in (
            "record", "segment", "first_token", "tokens_here")}}
        result.append(told)
    return result


def describe(told: dict[str, Any]) -> str:
    """An explanation as text for people."""
    source = told["source"]
    lines = [told["doc_id"]]
    if "row" in told:
        at = told["row"]
        lines.append(f"  seen in     step {at['step']}, row {at['row']}: tokens {at['first_token']} to "
                     f"{at['first_token'] + at['tokens_here'] - 1} of record {at['record']}")
    lines.append(f"  source      {source['place']} of {source['dataset']} ({source['from']}), "
                 f"licence {source['licence'] or 'not stated'}")
    if source["input"]:
        lines.append(f"  input       {source['input']['path']}, {source['input']['bytes']:,} bytes, SHA-256 "
                     f"{source['input']['sha256'][:16]}")
    if told["bytes"] is not None:
        lines.append(f"  text        {told['characters']:,} characters, {told['bytes']:,} bytes, date "
                     f"{told['date'] or 'unknown'}")
    if told["meta"]:
        lines.append("  meta        " + _facts(told["meta"]))
    for stage in told["stages"]:
        hits = stage["facts"].get("hits") or []
        known = {name: fact for name, fact in stage["facts"].items() if name != "hits"}
        facts = f"  ({_facts(known)})" if known else ""
        lines.append(f"  {stage['section'][:15]:<15} {stage['stage']:<20} {stage['verdict']}{facts}")
        lines += [f"  hit         {_hit(hit)}" for hit in hits]
    for copy in told["copies_dropped"][:COPIES_SHOWN]:
        rest = {key: value for key, value in copy.items() if key not in ("doc_id", "stage")}
        lines.append(f"  copy        {copy['doc_id']} was dropped by {copy['stage']}"
                     f"{f' ({_facts(rest)})' if rest else ''}")
    if len(told["copies_dropped"]) > COPIES_SHOWN:
        lines.append(f"  copy        and {len(told['copies_dropped']) - COPIES_SHOWN} more")
    lines.append("  weight      " + _facts(told["weight"]))
    if "corpus" in told:
        unit = "row" if told["corpus"]["path"].endswith(".parquet") else "line"
        lines.append(f"  in corpus   {told['corpus']['path']}, {unit} {told['corpus']['line']}")
    if told.get("packed"):
        at = told["packed"]
        lines.append(f"  packed      {at['packed']}: {at['split']} record {at['record']}, segment {at['segment']}, "
                     f"{at['tokens']} tokens")
    elif "packed" in told:
        lines.append("  packed      not in the packed set")
    return "\n".join(lines)


def _hit(hit: dict[str, Any]) -> str:
    """What of an evaluation set was found, in one line."""
    if hit["kind"] == "canary":
        return f"canary: {hit['text']}"
    items = ", ".join(hit["items"][:3]) + (" and others" if len(hit["items"]) > 3 else "")
    return (f"{hit['kind']}: {items} ({hit['field']}), {hit['words']} words from word {hit['position']} on, "
            f"likeness {hit['jaccard']:.2f}: {_facts({'text': hit['text']})}")


def _verdict(reason: str | None) -> str:
    return f"dropped: {reason}" if reason else "kept"


def _facts(facts: dict[str, Any]) -> str:
    def short(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text if len(text) <= 100 else text[:100] + "..."

    return ", ".join(f"{key} {short(value)}" for key, value in facts.items())


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.explain",
                                     description=__doc__.split("\n")[0].partition(": ")[2].capitalize())
    parser.add_argument("doc_id", nargs="?", help="DATASET/ID, as in the corpus; for a broken row DATASET/PLACE")
    parser.add_argument("--corpus", help="corpus directory, with DOC_ID")
    parser.add_argument("--packed", help="packed set, to tell where the document is in it")
    parser.add_argument("--run", help="training run, with --step and --row instead of DOC_ID")
    parser.add_argument("--step", type=int, help="training step, from 0")
    parser.add_argument("--row", type=int, help="row of that step's global batch, from 0")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if (arguments.doc_id is None) == (arguments.run is None):
        parser.error("give DOC_ID and --corpus, or --run, --step and --row")
    if arguments.doc_id is not None:
        if arguments.corpus is None:
            parser.error("DOC_ID needs --corpus")
        told = [Corpus(arguments.corpus).explain(arguments.doc_id)]
        if arguments.packed:
            told[0]["packed"] = packed_position(arguments.packed, arguments.doc_id)
    else:
        if arguments.step is None or arguments.row is None:
            parser.error("--run needs --step and --row")
        told = explain_row(arguments.run, arguments.step, arguments.row)
    print(json.dumps(told, ensure_ascii=False, indent=2) if arguments.json else "\n\n".join(map(describe, told)))


if __name__ == "__main__":
    command(_main)
