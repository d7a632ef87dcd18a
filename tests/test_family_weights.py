"""Published weights to ours and back, bit for bit; damaged and unknown ones are named, and nothing is written."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES, load
from hub_tokenizers import byte_level

from nanollama.config import ConfigError
from nanollama.data.files import DataError
from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.export.safetensors_file import SafetensorsDirectory, write_safetensors
from nanollama.export.weights import TensorInfo
from nanollama.models.families import FAMILIES
from nanollama.models.families.published import read_config
from nanollama.training.checkpoint import restore_numpy


def published(folder: Path, name: str, *, dtype: str = "bfloat16", shard_bytes: int = 1 << 30) -> Path:
    """A folder as transformers would write it."""
    case = load(name)
    arrays = {key: array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
              for key, array in case.weights.arrays.items()}  # fmt: skip
    groups = [(lambda: None, [(key, TensorInfo(array.shape, dtype))]) for key, array in arrays.items()]
    write_safetensors(folder, groups, lambda _, key: arrays[key], shard_bytes=shard_bytes)
    (folder / "config.json").write_text(json.dumps({**CASES[name], "torch_dtype": dtype}))
    return folder


@pytest.mark.parametrize(("name", "dtype", "shard_bytes"), [
    ("qwen2", "bfloat16", 1 << 14), ("llama3", "float16", 1 << 30), ("qwen3", "float32", 1 << 16),
    ("mixtral", "bfloat16", 1 << 14), ("qwen2-moe", "float16", 1 << 30), ("deepseek-v3", "bfloat16", 1 << 14),
])  # fmt: skip
def test_round_trip_is_bit_exact(tmp_path: Path, name: str, dtype: str, shard_bytes: int) -> None:
    source = published(tmp_path / "published", name, dtype=dtype, shard_bytes=shard_bytes)
    import_model(source, tmp_path / "run", say=lambda line: None)
    export(tmp_path / "run", tmp_path / "out", shard_bytes=shard_bytes)
    before, after = SafetensorsDirectory(source), SafetensorsDirectory(tmp_path / "out")
    assert before.tensors == after.tensors
    for key in before.tensors:
        assert np.array_equal(before.read(key).view(np.uint8), after.read(key).view(np.uint8)), key
    family = FAMILIES[load(name).model.family]
    again = read_config(json.loads((tmp_path / "out/config.json").read_text()), load(name).model.family, family, "out")
    assert again == load(name).model
    assert restore_numpy(tmp_path / "run")["step"] == 0


@pytest.mark.parametrize("name", ["minimind-moe", "deepseek-moe"])
def test_a_shared_expert_without_a_gate_is_written_as_half_of_twice_itself(tmp_path: Path, name: str) -> None:
    """What is written is what tests/parity.py compares with transformers, to the last bit."""
    case = load(name)
    import_model(published(tmp_path / "published", name, dtype="float32"), tmp_path / "run", say=lambda line: None)
    export(tmp_path / "run", tmp_path / "out")
    written = SafetensorsDirectory(tmp_path / "out")
    assert set(written.tensors) == set(case.given)
    for key, array in case.given.items():
        assert np.array_equal(written.read(key), array), key
    first = "model.layers.1.mlp.shared_expert"
    own = "shared_experts.0" if name == "minimind-moe" else "shared_experts"
    assert np.array_equal(
        written.read(f"{first}.down_proj.weight"), 2 * case.weights.arrays[f"model.layers.1.mlp.{own}.down_proj.weight"]
    )
    assert not written.read(f"{first}_gate.weight").any()
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2_moe"


def test_experts_and_layers_are_in_order() -> None:
    """One dense layer, then experts: layer and expert numbers go where they belong."""
    case = load("deepseek-v3")
    up = case.weights.arrays["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert np.array_equal(case.params["layers"]["expert_up"][0, 5], up.T)
    dense = case.weights.arrays["model.layers.0.mlp.up_proj.weight"]
    assert np.array_equal(case.params["dense_layers"]["up"][0], dense.T)


def test_modules_that_predict_later_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek V3 carries one as a layer past its last; a tensor of any other layer is refused."""
    source = published(tmp_path / "published", "deepseek-v3", dtype="float32")
    rewrite(source, lambda h: h.update({"model.layers.2.eh_proj.weight": h["model.norm.weight"]}))
    import_model(source, tmp_path / "run", say=lambda line: None)
    rewrite(source, lambda h: h.update({"model.layers.3.eh_proj.weight": h["model.norm.weight"]}))
    with pytest.raises(DataError, match=r"layers\.3\.eh_proj"):
        import_model(source, tmp_path / "other", say=lambda line: None)


@pytest.mark.parametrize(("change", "message"), [
    (lambda h: h.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"lacks .*experts\.3\.up_proj"),
    (lambda h: h.update({"model.layers.1.mlp.experts.4.up_proj.weight": h["model.norm.weight"]}), r"has .*experts\.4"),
    (lambda h: h.pop("model.layers.1.mlp.gate.weight"), r"lacks model\.layers\.1\.mlp\.gate"),
    (lambda h: h.update({"model.layers.0.mlp.gate.weight": h["model.norm.weight"]}), r"has .*0\.mlp\.gate"),
    (lambda h: h["model.layers.1.mlp.experts.2.down_proj.weight"].update(shape=[16, 64]), r"experts\.2\.down.* shape"),
])  # fmt: skip
def test_experts_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    source = published(tmp_path / "published", "qwen2-moe", dtype="float32")
    rewrite(source, change)
    with pytest.raises(DataError, match=message):
        import_model(source, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_stacked_layers_are_in_order() -> None:
    case = load("llama2")
    up = case.weights.arrays["model.layers.2.mlp.up_proj.weight"]
    assert np.array_equal(case.params["layers"]["up"][2], up.T)
    assert not np.array_equal(case.params["layers"]["up"][1], up.T)


# --- bad input: named, and nothing written ---


def damage_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100 + path.read_bytes())


def rewrite(folder: Path, change: Any) -> None:
    """Change the header's dict in place."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def transpose(header: dict[str, Any]) -> None:
    entry = header["model.layers.1.mlp.up_proj.weight"]
    entry["shape"] = entry["shape"][::-1]


def integers(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["dtype"] = "I16"


def entry(**changes: Any) -> Any:
    return lambda folder: rewrite(folder, lambda header: header["model.norm.weight"].update(changes))


def json_field(name: str, **changes: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**values, **changes}))

    return damage


def too_many_ids(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(byte_level(["<|end|>"]))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')


DAMAGES = {
    "vocabulary": (too_many_ids, "tokenizer has 257 ids, the model's vocab_size is 96"),
    "architecture": (json_field("config.json", model_type="gpt_bigcode"), "'gpt_bigcode' is not supported"),
    "field type": (json_field("config.json", rope_theta="x"), "a field has a value it cannot have"),
    "not utf-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json: not UTF-8 at byte 7"),
    "entry": (entry(data_offsets=[0]), "model.norm.weight: its entry in the header is not whole"),
    "negative": (entry(shape=[-64]), "model.norm.weight: shape .* not whole numbers"),
    "unknown type": (entry(dtype="F8_E4M3"), "model.norm.weight is F8_E4M3"),
    "truncated": (damage_truncate, "truncated"),
    "header": (damage_header, "truncated|not JSON"),
    "missing": (lambda f: rewrite(f, lambda h: h.pop("model.layers.2.mlp.up_proj.weight")), "layers.2.mlp.up_proj"),
    "extra": (lambda f: rewrite(f, lambda h: h.update(x=h["model.norm.weight"])), "has x"),
    "shape": (lambda f: rewrite(f, transpose), r"layers.1.mlp.up_proj.weight has shape \[64, 128\]"),
    "dtype": (lambda f: rewrite(f, integers), "model.norm.weight is int16"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_sources_are_named_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    source = published(tmp_path / "published", "llama2")
    damage, message = DAMAGES[kind]
    damage(source)
    with pytest.raises((DataError, ConfigError), match=message):
        import_model(source, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_missing_shard_is_named(tmp_path: Path) -> None:
    source = published(tmp_path / "published", "llama2", shard_bytes=1 << 14)
    lost = sorted(source.glob("model-*"))[2]
    lost.unlink()
    with pytest.raises(DataError, match=lost.name):
        import_model(source, tmp_path / "run", say=lambda line: None)


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    source = published(tmp_path / "published", "llama2", dtype="float32")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(DataError, match="NaN"):
        import_model(source, tmp_path / "run", say=lambda line: None)


def test_neither_import_nor_export_overwrites(tmp_path: Path) -> None:
    source = published(tmp_path / "published", "llama2")
    import_model(source, tmp_path / "run", say=lambda line: None)
    with pytest.raises(DataError, match="holds a run already"):
        import_model(source, tmp_path / "run", say=lambda line: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is there already"):
        export(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", dtype="float32")
    assert {info.dtype for info in SafetensorsDirectory(tmp_path / "out").tensors.values()} == {"float32"}
