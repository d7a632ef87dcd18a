"""Runs that start from other runs: parameters, lineage, refusals; adapters saved apart, resumed, merged, exported."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from packed_sets import make_packed_set, make_tokenizer
from test_train import settings

from nanollama import train as front_door
from nanollama.config import Config, ConfigError, MeshConfig, ModelConfig, resolve
from nanollama.data.files import DataError
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.export.add_tokens import extend
from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.export.imported import save_run
from nanollama.export.safetensors_file import SafetensorsDirectory
from nanollama.export.weights import parameter_shapes
from nanollama.generation.loading import load_model
from nanollama.models import lora as loras
from nanollama.parallel.mesh import make_mesh
from nanollama.training import initial
from nanollama.training.checkpoint import CheckpointError, find_step_folder, restore_params
from nanollama.training.integrity import checkpoint_hash, tree_hash
from nanollama.training.optim import make_optimizer
from nanollama.training.stored_parameters import parameter_infos

OLD, NEW, PADDED = 400, 408, 512
MODEL = ModelConfig(
    vocab_size=OLD, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
)
LORA = dict(rank=2, alpha=4.0, dropout=0.1, targets=("query", "up"))


def random_run(folder: Path, tokenizer: Tokenizer | None, model: ModelConfig = MODEL, seed: int = 0) -> Path:
    """A run folder of random weights, without training."""
    rng = np.random.default_rng(seed)
    arrays = {path: rng.normal(0, 0.1, shape).astype(np.float32) for path, shape in parameter_shapes(model).items()}
    readers = {path: (lambda array=array: array) for path, array in arrays.items()}
    return save_run(folder, model, readers, lineage={"format": "test"}, tokenizer=tokenizer, say=lambda line: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    tokenizer = make_tokenizer(folder / "old_tokenizer", OLD)
    random_run(folder / "base", tokenizer)
    extend(folder / "base", folder / "extended", chat_template="{{ messages }}", say=lambda line: None)
    make_packed_set(folder / "packed", tokenizer=load_tokenizer(folder / "extended/tokenizer"), documents=100)
    return folder


def config_of(data: Path, **changes: Any) -> Config:
    fields = settings(
        data,
        model={**dataclasses.asdict(MODEL), "vocab_size": NEW, "vocab_padding": PADDED - NEW},
        data=dict(tokenizer=str(data / "extended/tokenizer")),
        initial_checkpoint=str(data / "extended"),
        steps=4,
        checkpoint=dict(every=2, keep=3),
        evaluation=dict(every=0),
        logging=dict(sample_prompts=[]),
        batch=dict(global_rows=4, micro_batches=2),
    )
    return resolve({**fields, **changes})


@pytest.fixture(scope="module")
def adapters(data: Path) -> Path:
    """A finished LoRA run, with samples."""
    config = config_of(data, lora=LORA, logging=dict(tensorboard=False, sample_prompts=["the loader"], sample_tokens=2))
    assert front_door.train(config, data / "adapters")
    return data / "adapters"


def test_only_adapters_are_saved_and_their_base_is_named(data: Path, adapters: Path) -> None:
    folder = find_step_folder(adapters)
    assert set(parameter_infos(folder)) == {
        *(f"layers/{name}{suffix}" for name in ("query", "up") for suffix in (loras.A, loras.B)),
        "embedding_rows", "head_rows",
    }  # fmt: skip
    base = find_step_folder(data / "extended")
    lineage = json.loads((adapters / "lineage.json").read_text())
    assert lineage["parent"]["hash"] == checkpoint_hash(base)
    assert lineage["parent"]["step"] == 0
    assert (adapters / "samples" / "4.json").is_file()


def test_rows_that_nothing_has_trained_are_found(data: Path, adapters: Path, tmp_path: Path) -> None:
    """`LORA` names none: `adapters` trained those that `extend` added to its base."""

    def first(base: Path, workdir: Path = tmp_path / "none", **fields: Any) -> int:
        config = config_of(data, lora={**LORA, **fields}, initial_checkpoint=str(base))
        found = initial.with_new_rows(config, workdir).lora
        assert found is not None and found.train_rows_from is not None
        return found.train_rows_from

    assert json.loads((adapters / "config.json").read_text())["lora"]["train_rows_from"] == OLD
    assert first(data / "extended") == OLD
    assert [first(data / "extended", train_rows_from=given) for given in (0, OLD + 3)] == [0, OLD + 3]
    assert first(data / "base") == 0, "no token was added"
    assert first(adapters) == 0, "they were trained since"
    assert first(tmp_path / "gone", adapters) == OLD, "a run that goes on keeps its own"
    extend(data / "extended", tmp_path / "twice", ["<|more|>"], say=lambda line: None)
    assert first(tmp_path / "twice") == OLD, "added before, and not trained either"
    with pytest.raises(ConfigError, match=r"config\.lora\.targets.*nothing is trained"):
        first(data / "base", targets=())
    with pytest.raises(ConfigError, match=r"config\.initial_checkpoint"):
        first(tmp_path / "gone")


def test_resumed_adapters_are_the_unbroken_ones(data: Path, adapters: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapters, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    moved = tmp_path / "elsewhere"
    shutil.copytree(data / "extended", moved)  # paths may change, hashes may not
    config = config_of(data, lora=LORA, initial_checkpoint=str(moved))
    assert front_door.train(config, broken, resume=True)
    assert tree_hash(restore_params(broken)[0]) == tree_hash(restore_params(adapters)[0])


def test_loading_merges(data: Path, adapters: Path) -> None:
    model, (base, _) = load_model(adapters), restore_params(data / "extended")
    new, _ = restore_params(adapters)
    assert model.config.lora is None
    assert set(model.params) == set(base)
    step = np.einsum("ldr,lrhk->ldhk", new["layers"]["query_lora_a"], new["layers"]["query_lora_b"]) * 2.0
    np.testing.assert_allclose(model.params["layers"]["query"], base["layers"]["query"] + step, atol=1e-6)
    assert np.array_equal(model.params["layers"]["key"], base["layers"]["key"])
    assert np.array_equal(model.params["embedding"][:OLD], base["embedding"][:OLD])
    changed = np.abs(model.params["embedding"] - base["embedding"])[OLD:]
    assert np.abs(model.params["head"] - base["head"])[:, OLD:NEW].max(axis=0).min() > 0
    assert changed[NEW - OLD :].max() == 0, "padding learns nothing"


def test_export_merged_strips_the_padding(data: Path, adapters: Path, tmp_path: Path) -> None:
    export(adapters, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == NEW
    card = (tmp_path / "out/README.md").read_text()
    assert "adapters (rank 2, alpha 4) of query, up" in card
    assert checkpoint_hash(find_step_folder(data / "extended")) in card
    tensors = SafetensorsDirectory(tmp_path / "out")
    merged = load_model(adapters).params
    np.testing.assert_allclose(tensors.read("model.embed_tokens.weight"), merged["embedding"][:NEW], atol=1e-6)
    np.testing.assert_allclose(tensors.read("lm_head.weight"), merged["head"][:, :NEW].T, atol=1e-6)
    query = np.asarray(merged["layers"]["query"][0]).reshape(32, -1).T
    np.testing.assert_allclose(tensors.read("model.layers.0.self_attn.q_proj.weight"), query, atol=1e-6)
    again = import_model(tmp_path / "out", tmp_path / "again", say=lambda line: None)
    tokenizer = load_tokenizer(again / "tokenizer")
    assert (tokenizer.vocab_size, tokenizer.chat_template) == (NEW, "{{ messages }}")
    assert tokenizer.encode_markup("<|im_start|>a") == [OLD, *tokenizer.encode("a")]


def test_export_of_adapters_alone(data: Path, adapters: Path, tmp_path: Path) -> None:
    """As peft reads it: W + scale B A, and whole rows for the new tokens."""
    export(adapters, tmp_path / "adapter", adapter=True)
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (2, 4.0, ["q_proj", "up_proj"])
    assert said["trainable_token_indices"] == {"embed_tokens": list(range(OLD, NEW)), "lm_head": list(range(OLD, NEW))}
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/model.safetensors")
    found = SafetensorsDirectory(tmp_path / "adapter")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    step = found.read(f"{module}.lora_B.weight") @ found.read(f"{module}.lora_A.weight") * (4.0 / 2)
    base, merged = restore_params(data / "extended")[0], load_model(adapters).params
    np.testing.assert_allclose(base["layers"]["up"][0].T + step, merged["layers"]["up"][0].T, atol=1e-6)
    rows = found.read("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")
    np.testing.assert_allclose(rows, merged["embedding"][OLD:NEW], atol=1e-6)
    with pytest.raises(ConfigError, match="no adapters"):
        export(data / "extended", tmp_path / "none", adapter=True)
    assert not (tmp_path / "none").exists()


def test_a_base_is_proved_by_its_hash(data: Path, adapters: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(adapters, alone / "adapters")
    folder = alone / "adapters/checkpoints/4"
    metadata = json.loads((folder / "metadata/metadata").read_text())
    metadata["parent"]["path"] = "gone/extended"
    with pytest.raises(CheckpointError, match="their base is gone"):
        initial._find_base(metadata, folder.parent)
    shutil.copytree(data / "extended", alone / "extended")  # found beside the run
    assert initial._find_base(metadata, folder.parent).parent.parent == alone / "extended"
    shutil.rmtree(alone / "extended")
    random_run(alone / "extended", load_tokenizer(data / "extended/tokenizer"), config_of(data).model, seed=1)
    with pytest.raises(CheckpointError, match="is not the base of the adapters"):
        initial._find_base(metadata, folder.parent)


@pytest.mark.parametrize(
    ("mesh", "determinism"), [(MeshConfig(4), "elastic"), (MeshConfig(2, 2, 2), "same_mesh")], ids=str
)
def test_parameters_are_read_onto_any_mesh(data: Path, mesh: MeshConfig, determinism: str) -> None:
    expected, _ = restore_params(data / "extended")
    for lora in (None, LORA):
        config = config_of(data, lora=lora, determinism=determinism)
        state = initial.fresh(config, make_optimizer(config), make_mesh(mesh))
        assert int(state.step) == 0
        assert tree_hash(loras.base(state.params)) == tree_hash(expected)
        if lora:
            assert float(np.abs(state.params["layers"]["query_lora_b"]).max()) == 0
        up = state.params["layers"]["up"]
        assert up.addressable_shards[0].data.size == up.size // (mesh.fsdp * mesh.tensor)
        assert int(jax.tree.leaves(state.opt_state)[0]) == 0


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    config = config_of(data)
    tokenizer = load_tokenizer(data / "extended/tokenizer")
    parent = initial.find_parent(config, tokenizer)
    assert parent is not None and parent["hash"] == checkpoint_hash(find_step_folder(data / "extended"))
    longer = dataclasses.replace(config.model, rope_theta=5e5, max_position_embeddings=8192)
    assert initial.find_parent(dataclasses.replace(config, model=longer), tokenizer) == parent
    wider = dataclasses.replace(config.model, num_layers=3, rope_theta=5e5)
    with pytest.raises(CheckpointError, match="num_layers: checkpoint 1, asked 3"):
        initial.find_parent(dataclasses.replace(config, model=wider), tokenizer)
    with pytest.raises(CheckpointError, match="rope_theta"):  # adapters are for the base as it is
        initial.find_parent(dataclasses.replace(config_of(data, lora=LORA), model=longer), tokenizer)
    with pytest.raises(DataError, match="the same ids mean other text"):
        initial.find_parent(config, load_tokenizer(data / "old_tokenizer"))
    with pytest.raises(ConfigError, match=r"config\.initial_checkpoint"):
        initial.find_parent(dataclasses.replace(config, initial_checkpoint=str(tmp_path)), tokenizer)
    random_run(tmp_path / "untold", None, config.model)
    with pytest.raises(CheckpointError, match="imported without a tokenizer"):
        initial.find_parent(dataclasses.replace(config, initial_checkpoint=str(tmp_path / "untold")), tokenizer)
    for wrong, field in (
        (dict(rank=0), "rank"), (dict(dropout=1.0), "dropout"), (dict(targets=(), train_rows_from=0), "targets"),
        (dict(train_rows_from=NEW), "train_rows_from"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"config.lora.{field}"):
            config_of(data, lora={**LORA, **wrong})
    with pytest.raises(ConfigError, match="without an initial_checkpoint"):
        config_of(data, lora=LORA, initial_checkpoint="")
