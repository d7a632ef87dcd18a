"""The files beside the checkpoints: which run a folder holds, where and from what it was made, its results.

Owns config.json, config_as_given.txt, environment.json, lineage.json, results.json and the rule which changes
a resumed run may make. Knows nothing of training: the loop calls it before the first step.
"""

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nanollama
from nanollama.config import Config, ConfigError, as_dict, resolve
from nanollama.data.files import DataError, read_json, write_atomic, write_json
from nanollama.experiments import environment as environments
from nanollama.experiments import lineage as lineages

# A resumed run may change how far it goes, what it writes, and how fast the same function is computed. What
# it learns from and what it learns into stay; paths may move, for the data in them is compared by its hashes.
MAY_CHANGE = ("name", "steps", "initial_checkpoint",
              "logging.*", "checkpoint.*", "evaluation.*", "mesh.*", "batch.micro_batches",
              "compute.remat", "compute.scan_unroll", "compute.attention", "compute.loss_chunk_tokens",
              "data.threads", "data.tokenizer", "data.sets[*].path", "data.sets[*].recipe")
# In elastic mode micro-batches fix the order of every sum, so they are part of what the run computes.
FIXED_WHEN_ELASTIC = ("batch.micro_batches",)
_ABSENT = "(absent)"


class Change(NamedTuple):
    """One field that differs between the folder's config and the one asked for."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} in the folder, {self.now!r} now"


def check_resume(workdir: str | Path, config: Config) -> list[Change]:
    """Changes a run resumed in `workdir` makes, all of them allowed; empty where there is nothing to resume.

    Errors: DataError lists every difference that may not be, and what to do.
    """
    workdir = Path(workdir)
    if not _has_checkpoints(workdir):  # a run that saved nothing starts again, whatever its config was
        return []
    if not (workdir / "config.json").is_file():
        raise DataError(f"{workdir}: has checkpoints but no config.json, so nothing says what they are. "
                        "Put config.json back, or choose another --workdir.")
    changes = differences(_filled(read_json(workdir / "config.json")), as_dict(config))
    fixed = FIXED_WHEN_ELASTIC if config.determinism == "elastic" else ()
    refused = [str(item) for item in changes if item.field in fixed or not may_change(item.field)]
    refused += _data_changes(workdir, config)
    if refused:
        free = [rule for rule in MAY_CHANGE if rule not in fixed]
        raise DataError(
            f"{workdir / 'config.json'}: the folder holds a run with another config, and a resumed run must "
            "be the same one:\n  " + "\n  ".join(refused) + "\n"
            f"Only these may change on resume: {', '.join(free)}. Put the values back to go on with it, "
            "or give another --workdir to start a new one.")
    return changes


def micro_batches_before(workdir: Path, config: Config) -> int | None:
    """Those of the run that goes on in `workdir`, on these devices with as many rows: others would round otherwise."""
    said, made_on = workdir / "config.json", workdir / "environment.json"
    if not (_has_checkpoints(workdir) and said.is_file() and made_on.is_file()):
        return None
    before, devices = read_json(said)["batch"], read_json(made_on)["devices"]
    same = before["global_rows"] == config.batch.global_rows and devices == environments.environment()["devices"]
    return before["micro_batches"] if same else None


def prepare(workdir: str | Path, config: Config, *, step: int = 0, given: str = "",
            parent: dict[str, Any] | None = None) -> dict[str, Any]:
    """Check that `config` may go on here, then describe the run in its folder; call it at every start.

    `step` is where the run goes on, `given` the config as the user gave it (see `as_given`), `parent` the
    checkpoint a new run starts from. Returns what lineage.json now holds; each start is kept there under
    "starts", because a later one may use other code or another machine. Errors: as `check_resume`.
    """
    workdir = Path(workdir)
    changes = check_resume(workdir, config)
    before = read_json(workdir / "lineage.json") if step and (workdir / "lineage.json").is_file() else {}
    here, origin = environments.environment(), lineages.lineage(config, parent or before.get("parent"))
    start = {"step": step, "code": origin["code"], "devices": here["devices"],
             "changes": [str(change) for change in changes]}
    # Starts past `step` were undone by going back to its checkpoint.
    origin["starts"] = [*(item for item in before.get("starts", []) if item["step"] < step), start]
    write_json(workdir / "config.json", as_dict(config))
    if given:
        write_atomic(workdir / "config_as_given.txt", given)
    write_json(workdir / "environment.json", here)
    write_json(workdir / "lineage.json", origin)
    return origin


def facts(config: Config) -> dict[str, str]:
    """What all processes of a run must have alike: the config's fields, and the packages that compute."""
    described = {"nanollama": nanollama.__version__, "python": platform.python_version(),
                 **{name: str(environments.version(name)) for name in environments.PACKAGES}}
    return {**described, **dict(_leaves(as_dict(config), "config"))}


def _leaves(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _leaves(item, f"{where}.{name}" if isinstance(value, dict) else f"{where}[{name}]")
    else:
        yield where, repr(value)


def as_given(spec: str, overrides: list[str] | tuple[str, ...] = ()) -> str:
    """What the user gave: the command line's config arguments as comments, then the config file's text."""
    name, colon, argument = spec.partition(":")
    lines = [f"# --config={environments.public_path(name)}{colon}{argument}",
             *(f"# --config.{environments.public(item)}" for item in overrides), ""]
    return "\n".join(lines) + (Path(name).read_text(encoding="utf-8") if Path(name).is_file() else "")


def add_result(workdir: str | Path, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Put one evaluation's figures into results.json under `name`, replacing only that one; returns all."""
    path = Path(workdir) / "results.json"
    results = {**(read_json(path) if path.is_file() else {}), name: figures}
    write_json(path, results)
    return results


def differences(before: Any, now: Any, where: str = "") -> list[Change]:
    """Leaves that differ between two JSON-able trees, named like `data.sets[0].weight`."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(now) + [name for name in before if name not in now]
        return [change for name in names for change in differences(
            before.get(name, _ABSENT), now.get(name, _ABSENT), f"{where}.{name}" if where else name)]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [change for index, (old, new) in enumerate(zip(before, now, strict=True))
                for change in differences(old, new, f"{where}[{index}]")]
    return [] if before == now else [Change(where, before, now)]


def may_change(field: str) -> bool:
    """Whether a resumed run may change `field`; the rule is MAY_CHANGE."""
    rules = (re.escape(rule).replace(r"\[\*\]", r"\[\d+\]").replace(r"\.\*", r"\..+") for rule in MAY_CHANGE)
    return any(re.fullmatch(rule, field) for rule in rules)


def _has_checkpoints(workdir: Path) -> bool:
    directory = workdir / "checkpoints"
    return directory.is_dir() and any(directory.iterdir())


def _filled(saved: Any) -> Any:
    """A saved config with the defaults of fields that are newer than it, where it still resolves."""
    try:
        return as_dict(resolve(saved))
    except ConfigError:
        return saved


def _data_changes(workdir: Path, config: Config) -> list[str]:
    """Tokenizer and packed sets that are not, by hash, those of the run in the folder."""
    path = workdir / "lineage.json"
    if not path.is_file():
        return []
    before, now = read_json(path), lineages.lineage(config)
    pairs = [("tokenizer", "sha256", before.get("tokenizer") or {}, now["tokenizer"])]
    pairs += [(f"data.sets[{index}]", "dataset_id", old, new)
              for index, (old, new) in enumerate(zip(before.get("sets", []), now["sets"], strict=False))]
    return [f"{name} at {new['path']}: {key} {old[key]} in the folder, {new[key]} now"
            for name, key, old, new in pairs if old.get(key) and new[key] and old[key] != new[key]]
