"""A run folder says what it holds and where it came from, and refuses to be resumed as another run."""

import dataclasses
import getpass
import json
import re
import socket
import subprocess
from pathlib import Path

import pytest

from nanollama.config import Config, DataConfig, PackedSetConfig, as_dict, resolve
from nanollama.data.files import DataError, sha256_file, write_json
from nanollama.experiments import environment, lineage, run_folder
from nanollama.experiments.run_folder import MAY_CHANGE, Change, may_change


def make_config(folder: Path, **changes) -> Config:
    values = {
        "name": "tiny", "steps": 20,
        "model": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2,
                  "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
        "data": {"sets": [{"path": str(folder / "packed")}], "tokenizer": str(folder / "tokenizer"),
                 "sequence_length": 32},
        "batch": {"global_rows": 4}}
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = values
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return resolve(values)


def make_data(folder: Path, dataset_id: str = "d1", model: bytes = b"pieces") -> None:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer" / "manifest.json", {"vocab_size": 64, "algorithm": "bpe"})
    write_json(folder / "packed" / "manifest.json", {
        "dataset_id": dataset_id, "tokenizer": {"sha256": "t"}, "corpus": {"manifest_sha256": "c"}})


def started(folder: Path, **changes) -> tuple[Path, Config]:
    """A run folder with a checkpoint, and its config."""
    make_data(folder)
    config, workdir = make_config(folder, **changes), folder / "train"
    run_folder.prepare(workdir, config)
    (workdir / "checkpoints" / "10").mkdir(parents=True)
    return workdir, config


def test_a_new_folder_and_the_same_config_are_fine(tmp_path):
    config = make_config(tmp_path)
    assert run_folder.check_resume(tmp_path / "new", config) == []
    workdir, config = started(tmp_path)
    assert run_folder.check_resume(workdir, config) == []


def test_config_json_is_the_config(tmp_path):
    workdir, config = started(tmp_path)
    assert resolve(json.loads((workdir / "config.json").read_text())) == config


@pytest.mark.parametrize(("field", "value"), [
    ("model__num_layers", 4), ("model__rope_theta", 500.0), ("model__tie_embeddings", True), ("seed", 1),
    ("data__sequence_length", 16), ("data__mask_documents", False), ("batch__global_rows", 8),
    ("optimizer__learning_rate", 1e-3), ("schedule__warmup_steps", 2), ("loss__z_loss", 0.0),
    ("compute__dtype", "bfloat16"), ("determinism", "elastic")])
def test_what_the_run_computes_may_not_change(tmp_path, field, value):
    workdir, _ = started(tmp_path)
    name = field.replace("__", ".")
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(DataError, match=re.escape(f"{name}: ")) as error:
        run_folder.prepare(workdir, make_config(tmp_path, **{field: value}), step=10)
    assert f"{value!r} now" in str(error.value) and "--workdir" in str(error.value)
    assert (workdir / "config.json").read_bytes() == before  # refused before anything is written


@pytest.mark.parametrize(("field", "value"), [
    ("steps", 40), ("name", "longer"), ("logging__every", 1), ("checkpoint__keep", 9),
    ("evaluation__every", 5), ("compute__remat", "full"), ("compute__scan_unroll", 1),
    ("compute__loss_chunk_tokens", 64), ("mesh__fsdp", 2), ("data__threads", 8), ("batch__micro_batches", 2)])
def test_how_far_and_how_fast_may_change(tmp_path, field, value):
    workdir, config = started(tmp_path)
    (change,) = run_folder.check_resume(workdir, make_config(tmp_path, **{field: value}))
    node = as_dict(config)
    for name in field.split("__"):
        node = node[name]
    assert change == Change(field.replace("__", "."), node, value)


def test_elastic_runs_keep_their_micro_batches(tmp_path):
    workdir, _ = started(tmp_path, determinism="elastic", batch__micro_batches=4)
    with pytest.raises(DataError, match=r"batch\.micro_batches: 4 in the folder, 2 now"):
        run_folder.check_resume(workdir, make_config(tmp_path, determinism="elastic", batch__micro_batches=2))


def test_every_difference_is_listed_at_once(tmp_path):
    workdir, _ = started(tmp_path)
    with pytest.raises(DataError) as error:
        run_folder.check_resume(workdir, make_config(tmp_path, model__num_layers=4, seed=3, steps=99))
    assert "model.num_layers: 2 in the folder, 4 now" in str(error.value)
    assert "seed: 0 in the folder, 3 now" in str(error.value)
    assert "99" not in str(error.value)  # allowed, so no reason to refuse


def test_mutant_rule_that_allows_everything_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "may_change", lambda field: True)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_every_difference_is_listed_at_once(tmp_path)


def test_every_config_field_has_been_decided_on():
    """A new field is refused on resume unless MAY_CHANGE names it; a rule that names no field is stale."""
    fields = list(_leaves(as_dict(make_config(Path("x")))))
    for rule in MAY_CHANGE:
        stem = rule.replace(".*", ".").replace("[*]", "[0]")
        assert any(field.startswith(stem) and may_change(field) for field in fields), f"{rule} names no field"
    fixed = ("model.", "optimizer.", "schedule.", "loss.", "seed", "determinism", "data.mask", "data.seq")
    assert not any(may_change(field) for field in fields if field.startswith(fixed))


def _leaves(node, where=""):
    if isinstance(node, dict):
        for name, item in node.items():
            yield from _leaves(item, f"{where}.{name}" if where else name)
    elif isinstance(node, list) and node:
        for index, item in enumerate(node):
            yield from _leaves(item, f"{where}[{index}]")
    else:
        yield where


def test_data_may_move_but_not_change(tmp_path):
    workdir, config = started(tmp_path)
    make_data(tmp_path / "elsewhere")
    moved = dataclasses.replace(config, data=DataConfig(
        sets=(PackedSetConfig(path=str(tmp_path / "elsewhere/packed")),),
        tokenizer=str(tmp_path / "elsewhere/tokenizer"), sequence_length=32))
    changed = run_folder.check_resume(workdir, moved)
    assert {change.field for change in changed} == {"data.tokenizer", "data.sets[0].path"}
    make_data(tmp_path, dataset_id="d2", model=b"other pieces")
    with pytest.raises(DataError, match=r"dataset_id d1 in the folder, d2 now") as error:
        run_folder.check_resume(workdir, config)
    assert "tokenizer at" in str(error.value)


def test_a_run_that_saved_nothing_starts_again_with_any_config(tmp_path):
    make_data(tmp_path)
    run_folder.prepare(tmp_path / "train", make_config(tmp_path))
    assert run_folder.check_resume(tmp_path / "train", make_config(tmp_path, model__num_layers=4)) == []


def test_checkpoints_without_a_config_are_not_guessed_at(tmp_path):
    workdir, config = started(tmp_path)
    (workdir / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        run_folder.check_resume(workdir, config)


def test_a_config_saved_before_a_field_existed_still_resumes(tmp_path):
    workdir, config = started(tmp_path)
    saved = as_dict(config)
    del saved["data"]["mask_documents"], saved["loss"]
    write_json(workdir / "config.json", saved)
    assert run_folder.check_resume(workdir, config) == []
    saved["gone"] = 1  # a field this version does not know
    write_json(workdir / "config.json", saved)
    with pytest.raises(DataError, match="gone: 1 in the folder"):
        run_folder.check_resume(workdir, config)


def test_lineage_names_every_input_and_every_start(tmp_path):
    workdir, config = started(tmp_path)
    run_folder.prepare(workdir, config, step=10)
    run_folder.prepare(workdir, make_config(tmp_path, steps=99), step=15)
    run_folder.prepare(workdir, config, step=10)  # the checkpoint of step 15 was lost
    found = json.loads((workdir / "lineage.json").read_text())
    (packed,) = found["sets"]
    assert packed["dataset_id"] == "d1" and packed["corpus_manifest_sha256"] == "c"
    assert packed["manifest_sha256"] == sha256_file(tmp_path / "packed/manifest.json")
    assert found["tokenizer"]["sha256"] == sha256_file(tmp_path / "tokenizer/tokenizer.model")
    assert [start["step"] for start in found["starts"]] == [0, 10]
    assert found["starts"][0]["devices"]["platform"] == "cpu" and found["parent"] is None
    assert found["starts"][1]["changes"] == ["steps: 99 in the folder, 20 now"]


def test_parent_is_kept_on_resume(tmp_path):
    workdir, config = started(tmp_path)
    run_folder.prepare(workdir, config, parent={"path": "runs/base", "step": 7})
    run_folder.prepare(workdir, config, step=10)
    assert json.loads((workdir / "lineage.json").read_text())["parent"] == {"path": "runs/base", "step": 7}


def test_what_is_not_there_is_none(tmp_path):
    found = lineage.lineage(make_config(tmp_path / "nowhere"))
    assert found["tokenizer"]["sha256"] is None and found["sets"][0]["dataset_id"] is None


def test_commit_is_of_the_checkout_that_holds_nanollama_only(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments],
                       check=True, capture_output=True)

    package = tmp_path / "nanollama"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "other.txt").write_text("")
    git("init")
    git("add", "other.txt")
    git("commit", "-m", "somebody else's project")
    monkeypatch.setattr(lineage.nanollama, "__file__", str(package / "__init__.py"))
    assert lineage.code()["git_commit"] is None
    git("add", "nanollama")
    git("commit", "-m", "ours")
    assert re.fullmatch(r"[0-9a-f]{40}", lineage.code()["git_commit"])
    assert lineage.code()["git_dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    assert lineage.code()["git_dirty"] is True


def test_environment_tells_versions_and_no_names(tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={home}/dump")
    found = environment.environment()
    text = json.dumps(found)
    assert found["packages"]["jax"] and found["packages"]["numpy"] and found["processor"]["cores"] >= 1
    assert found["variables"]["XLA_FLAGS"] == "--xla_dump_to=~/dump"
    for private in (str(home), socket.gethostname(), f"/home/{getpass.getuser()}"):
        assert private not in text


def test_public_leaves_other_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setattr(environment.getpass, "getuser", lambda: "ann")
    assert environment.public("/home/ann/runs /home/annabel/x") == "~/runs /home/annabel/x"
    assert environment.public("/Users/ann/x and /data/ann") == "~/x and /data/ann"


def test_config_as_given_keeps_the_command_line_and_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text("def get_config(arg): ...\n")
    text = run_folder.as_given("c.py:runlocal,steps=3", ["seed=1"])
    assert text == "# --config=c.py:runlocal,steps=3\n# --config.seed=1\ndef get_config(arg): ...\n"
    make_data(tmp_path)
    run_folder.prepare(tmp_path / "train", make_config(tmp_path), given=text)
    assert (tmp_path / "train/config_as_given.txt").read_text() == text


def test_results_of_evaluations_are_merged(tmp_path):
    run_folder.add_result(tmp_path, "perplexity", {"nll_per_token": 3.0})
    run_folder.add_result(tmp_path, "arc", {"accuracy": 0.3})
    run_folder.add_result(tmp_path, "perplexity", {"nll_per_token": 2.5})
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "perplexity": {"nll_per_token": 2.5}, "arc": {"accuracy": 0.3}}
