"""Families: published configs and weights to ours and back, equal to the reference; the unsupported is refused."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from family_cases import CASES, GOLDEN, GREEDY, LAYOUTS, PROMPT, Results, gradient_error, load, ours, rows

from nanollama.config import ComputeConfig, ConfigError, ModelConfig, RopeScaling
from nanollama.data.files import DataError
from nanollama.export.huggingface import export
from nanollama.export.import_huggingface import import_model
from nanollama.export.safetensors_file import SafetensorsDirectory, write_safetensors
from nanollama.export.weights import TensorInfo, parameter_shapes, published_tensors
from nanollama.models.accounting import count_parameters
from nanollama.models.decoder import Decoder, head
from nanollama.models.families import FAMILIES, PRESETS, family_of, preset
from nanollama.models.families.published import read_config, write_config
from nanollama.training.checkpoint import restore_numpy

TIED = "llama3"


# --- the function, against what transformers computed (tests/parity.py wrote it) ---


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str) -> None:
    case, golden = load(name), np.load(GOLDEN / f"{name}.npz")
    # Dynamic NTK rotates a growing text anew at each length, so there sampling is the only way to the same tokens.
    found = ours(case, None if "dynamic" in name else golden["greedy"])
    check_golden(found, golden, name)
    mutant = found._replace(logits={layout: np.roll(values, 1, axis=1) for layout, values in found.logits.items()})
    with pytest.raises(AssertionError):
        check_golden(mutant, golden, name)


def check_golden(found: Results, golden: Any, name: str) -> None:
    assert list(found.greedy) == list(golden["greedy"]), "greedy tokens"
    assert len(found.greedy) == PROMPT + GREEDY
    for layout in LAYOUTS:
        assert np.abs(found.logits[layout][:, ::8] - golden[f"logits/{layout}"]).max() <= 1e-4
    norms = np.array([np.linalg.norm(found.gradients[tensor.name]) for tensor, _ in load(name).compared])
    np.testing.assert_allclose(norms, golden["gradients"], rtol=1e-4)


def test_a_change_of_any_feature_is_seen() -> None:
    """The comparison above could not tell features apart that do nothing: each must move the logits."""
    yarn = load("qwen3-yarn").model.rope_scaling
    assert yarn is not None
    changes_of_experts: list[tuple[str, dict[str, Any]]] = []
    changes: dict[str, dict[str, Any]] = {
        "llama3": dict(rope_scaling=None),
        "qwen2": dict(sliding_window=0, full_attention_layers=0),
        "qwen2-dynamic": dict(rope_scaling=None),
        "qwen3-yarn": dict(rope_scaling=dataclasses.replace(yarn, attention_factor=1.0)),
        "mistral": dict(full_attention_layers=1),
    }
    for name, moe, latent in [
        ("mixtral", dict(normalize=False), {}),
        ("qwen3-moe", dict(normalize=False), {}),
        ("deepseek-v2", dict(scale=1.0), {}),
        ("deepseek-v2", dict(groups=1, groups_per_token=1), {}),
        ("deepseek-v3", dict(groups=1, groups_per_token=1), {}),
        ("deepseek-v3", {}, dict(rope_interleaved=False)),
        ("deepseek-v3-halves", {}, dict(rope_interleaved=True)),
    ]:
        changed = load(name).model
        assert changed.moe is not None
        change: dict[str, Any] = {"moe": dataclasses.replace(changed.moe, **moe)}
        if latent and changed.latent is not None:
            change["latent"] = dataclasses.replace(changed.latent, **latent)
        changes_of_experts.append((name, change))
    mscale = load("deepseek-v3").model.rope_scaling
    assert mscale is not None
    changes_of_experts.append(("deepseek-v3", dict(rope_scaling=dataclasses.replace(mscale, mscale_all_dim=0.0))))
    for name, change in [*changes.items(), *changes_of_experts]:
        case, golden = load(name), np.load(GOLDEN / f"{name}.npz")
        mutant = case._replace(model=dataclasses.replace(case.model, **change))
        batch = rows("padded", case.model.vocab_size)
        decoder = Decoder(mutant.model, ComputeConfig(scan_unroll=1))
        run = jax.jit(decoder.apply)
        hidden, _ = run({"params": case.params}, batch["tokens"], batch["positions"], batch["first_key"])
        logits = np.asarray(hidden @ head(case.params))[:1, ::8]
        assert np.abs(logits - golden["logits/padded"][:1]).max() > 1e-2, name


# --- weights both ways ---


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


@pytest.mark.parametrize("name", PRESETS)
def test_names_cover_every_parameter(name: str) -> None:
    model = ModelConfig(**preset(name))
    tensors = published_tensors(model, FAMILIES[model.family])
    shapes = parameter_shapes(model)
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors) == count_parameters(model).total
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count_parameters(model).total


PUBLISHED_SIZES = {
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "mistral-7b": 7_241_732_096,
    "qwen-0.5b": 494_032_768,
    "qwen-1.5b": 1_543_714_304,
    "qwen-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-1.7b": 1_720_574_976,
    "minimind-26m": 26e6,
    "minimind-104m": 104e6,
    "minimind-145m-moe": 145e6,
    "mixtral-8x7b": 46_702_792_704,  # arXiv:2401.04088: 47B
    "qwen-moe": 14_315_784_192,  # its model card: 14.3B
    "qwen3-30b-moe": 30_532_122_624,  # arXiv:2505.09388: 30.5B
    "deepseek-moe-16b": 16_375_728_128,  # arXiv:2401.06066: 16.4B
    "deepseek-v2-lite": 15_706_484_224,  # arXiv:2405.04434, appendix B: 15.7B
    "deepseek-v3": 671e9,  # arXiv:2412.19437: 671B
    "nanollama-1b": 1.1e9,
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_size(name: str) -> None:
    assert count_parameters(ModelConfig(**preset(name))).total == pytest.approx(PUBLISHED_SIZES[name], rel=0.01)


OURS = ("llama-micro", "llama-23m", "llama-42m", "llama-124m", "nanollama-1b", "deepseek-moe-7b")


@pytest.mark.parametrize("name", OURS)
def test_sizes_of_our_own_presets_suit_k_quants(name: str) -> None:
    model = ModelConfig(**preset(name))
    sizes = [model.hidden_size, model.intermediate_size]
    if model.moe is not None:
        sizes += [model.moe.expert_size, model.moe.shared_size]
    assert not any(size % 256 for size in sizes)


# --- configs ---


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name: str) -> None:
    model = ModelConfig(**preset(name))
    if FAMILIES[model.family].exported is not None:
        pytest.skip("written as another family")
    model = dataclasses.replace(model, max_position_embeddings=model.max_position_embeddings or 2048)
    family = FAMILIES[model.family]
    assert read_config(write_config(model, family), model.family, family, "config.json") == model


@pytest.mark.parametrize(("name", "change", "field"), [
    ("llama2", {"mlp_bias": True}, "mlp_bias"),
    ("llama2", {"attention_bias": True}, "attention_bias"),
    ("llama2", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama2", {"logit_scale": 2.0}, "logit_scale"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama2", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
    ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    ("llama2", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
    ("llama2", {"num_attention_heads": "many"}, "num_attention_heads"),
    ("llama2", {"num_key_value_heads": 3}, "num_kv_heads"),
    ("llama2", {"hidden_size": 64.5}, "hidden_size"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, "layer_types"),
    ("minimind", {"use_moe": True, "scoring_func": "sigmoid"}, "scoring_func"),
    ("minimind", {"use_moe": True, "n_shared_experts": 2}, "n_shared_experts"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token"),
    ("qwen2-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen2-moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("qwen2-moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3-moe", {"n_shared_experts": 1}, "n_shared_experts"),
    ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek-v2", {"n_group": 3}, "groups"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek-v3", {"attention_bias": True}, "attention_bias"),
    ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
])  # fmt: skip
def test_unsupported_fields_are_refused_by_name(name: str, change: dict[str, Any], field: str) -> None:
    config = CASES[name] | change
    our_name, family = family_of(config["model_type"], "config.json")
    with pytest.raises(ConfigError, match=field):
        read_config(config, our_name, family, "config.json")


def test_unknown_architecture_and_inexpressible_features() -> None:
    with pytest.raises(ConfigError, match="gpt_bigcode"):
        family_of("gpt_bigcode", "config.json")
    model = dataclasses.replace(load("llama2").model, qk_norm=True)
    with pytest.raises(ConfigError, match="qk_norm"):
        write_config(model, FAMILIES["llama"])


def test_ntk_is_written_as_the_theta_it_is() -> None:
    model = dataclasses.replace(load("llama2").model, rope_scaling=RopeScaling("ntk", 4.0))
    assert write_config(model, FAMILIES["llama"])["rope_theta"] == pytest.approx(10_000 * 4 ** (16 / 14))


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
    from test_hub_tokenizer import byte_level

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


def test_gradients_are_compared_relative_to_each_tensor() -> None:
    one = {"a": np.array([1.0, 100.0]), "b": np.array([1e-3])}
    assert gradient_error({**one, "b": np.array([2e-3])}, one) == pytest.approx(1.0)
