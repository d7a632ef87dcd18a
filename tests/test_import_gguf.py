"""GGUF to a run folder: names, layout, dequantisation; damaged files are named and nothing is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import load

from nanollama.config import ConfigError
from nanollama.data.files import DataError
from nanollama.training.checkpoint import restore_numpy

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

from nanollama.export.import_gguf import _NAMES, import_gguf  # noqa: E402


def write(
    path: Path, name: str, *, quantise: bool = False, skip: str = "", extra: dict[str, Any] | None = None
) -> Path:
    """The case as llama.cpp's converter writes it: Llama's rotary pairs interleaved."""
    case = load(name)
    model, architecture = case.model, case.model.family
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_key_length(model.head_dim)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    for published, array in case.weights.arrays.items():
        stem = published.removeprefix("model.layers.0.").rsplit(".", 1)
        layer = ""
        if published.startswith("model.layers."):
            number, rest = published.removeprefix("model.layers.").split(".", 1)
            layer, stem = f"blk.{number}.", rest.rsplit(".", 1)
        key = f"{layer}{names[stem[0]]}.{stem[1]}"
        if architecture == "llama" and key.split(".")[-2] in ("attn_q", "attn_k"):
            halves = array.reshape(-1, 2, model.head_dim // 2, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        if key == skip:
            continue
        if quantise and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_values_and_layout(tmp_path: Path, name: str) -> None:
    run = import_gguf(write(tmp_path / "m.gguf", name), tmp_path / "run", say=lambda line: None)
    saved, case = restore_numpy(run)["params"], load(name)
    assert np.array_equal(saved["embedding"], case.params["embedding"])
    for key, values in case.params["layers"].items():
        assert np.array_equal(saved["layers"][key], values), key


def test_quantised_values_are_near(tmp_path: Path) -> None:
    run = import_gguf(write(tmp_path / "m.gguf", "llama2", quantise=True), tmp_path / "run", say=lambda line: None)
    saved, expected = restore_numpy(run)["params"]["layers"]["query"], load("llama2").params["layers"]["query"]
    assert 0 < np.abs(saved - expected).max() < 5e-3


def test_bad_files_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    def refused(path: Path, message: str, error: type[Exception] = DataError) -> None:
        with pytest.raises(error, match=message):
            import_gguf(path, tmp_path / "run", say=lambda line: None)
        assert not (tmp_path / "run").exists()

    whole = write(tmp_path / "m.gguf", "llama2").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (2, 60, 400, len(whole) - 200):
        cut.write_bytes(whole[:size])
        refused(cut, "truncated|does not begin")
    cut.write_bytes(b"GGML" + whole[4:])
    refused(cut, "does not begin with GGUF")
    refused(tmp_path / "none.gguf", "no such file")
    refused(write(tmp_path / "a.gguf", "llama2", skip="blk.1.ffn_up.weight"), "layers.1.mlp.up_proj.weight")
    refused(write(tmp_path / "b.gguf", "llama2", extra={"llama.expert_count": 4}), "llama.expert_count", ConfigError)
    partly = write(tmp_path / "c.gguf", "llama2", extra={"llama.rope.dimension_count": 4})
    refused(partly, "dimension_count", ConfigError)
    whole_name = write(tmp_path / "d.gguf", "llama2").read_bytes()
    (tmp_path / "e.gguf").write_bytes(whole_name.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    refused(tmp_path / "e.gguf", "layers.1.mlp.up_proj.weight")
    key = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
    (tmp_path / "f.gguf").write_bytes(whole_name.replace(key + b"llama", key + b"lmaca"))
    refused(tmp_path / "f.gguf", "'lmaca' is not supported", ConfigError)
    wrong = (64).to_bytes(8, "little") + (128).to_bytes(8, "little")
    at = whole_name.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4
    assert whole_name[at : at + 16] == wrong
    (tmp_path / "g.gguf").write_bytes(whole_name[:at] + wrong[8:] + wrong[:8] + whole_name[at + 16 :])
    refused(tmp_path / "g.gguf", r"layers.1.mlp.up_proj.weight has shape \[64, 128\]")
