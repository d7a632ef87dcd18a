"""From a row that a training step saw back to the documents it was made of.

Owns the way from a run folder (its config.json and lineage.json) over the order of rows to records and documents of
the packed sets. Goes no further: what was decided about a document is the pipeline's to tell.
"""

import os
from pathlib import Path
from typing import Any

from nanollama.config import DataConfig
from nanollama.data.files import DataError, read_json, sha256_file
from nanollama.data.loader import Loader
from nanollama.data.mixture import open_mixture
from nanollama.data.packed import MANIFEST_FILE, why
from nanollama.data.strict import from_mapping


def row_origin(run: str | os.PathLike[str], step: int, row: int) -> list[dict[str, Any]]:
    """The documents in row `row` of the global batch of step `step` (from 0) of the run in the folder `run`.

    One mapping per segment: set, split, record, segment, first_token, tokens_here, doc_id, source. Relative paths of
    the run are looked up from the working directory, then from the folders above `run`. Errors: DataError.
    """
    run = Path(run)
    for name in ("config.json", "lineage.json"):
        if not (run / name).is_file():
            raise DataError(f"{run / name}: no such file, so {run} is no training run's folder. Give the folder that "
                            "nanollama.train wrote (--workdir).")
    config, lineage = read_json(run / "config.json"), read_json(run / "lineage.json")
    data = dict(config["data"])
    data["tokenizer"] = _found(data["tokenizer"], run)
    data["sets"] = [{**item, "path": _found(item["path"], run)} for item in data["sets"]]
    for item, known in zip(data["sets"], lineage["sets"], strict=True):
        manifest = Path(item["path"]) / MANIFEST_FILE
        now = sha256_file(manifest) if manifest.is_file() else None
        if now != known["manifest_sha256"]:
            raise DataError(f"{item['path']}: is not the packed set that {run} read (manifest {str(now)[:16]}, the "
                            f"run's lineage says {str(known['manifest_sha256'])[:16]}). Put that one back.")
    mixture = open_mixture(from_mapping(DataConfig, data, "config.data"))
    rows = config["batch"]["global_rows"]
    if not 0 <= row < rows or not 0 <= step < config["steps"]:
        raise DataError(f"--step={step} --row={row}: of this run steps count from 0 to {config['steps'] - 1}, rows "
                        f"from 0 to {rows - 1}.")
    where = Loader(mixture, seed=config["seed"], global_batch=rows).where(step, row)
    found = []
    for record in where["records"]:
        for segment in why(where["set"], where["split"], record):
            document = segment["document"]
            found.append({"set": where["set"], "split": where["split"], "record": record,
                          "segment": segment["segment"], "first_token": segment["first_token"],
                          "tokens_here": segment["tokens_here"], "doc_id": document["doc_id"],
                          "source": document.get("source")})
    return found


def _found(path: str, run: Path) -> str:
    """`path`, or where it is seen from the run's folder when the run was started elsewhere."""
    if Path(path).exists() or Path(path).is_absolute():
        return path
    for folder in run.absolute().parents:
        if (folder / path).exists():
            return str(folder / path)
    return path
