"""Families: equal to what transformers computed; presets; published configs to ours and back, or refused by name."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from family_cases import CASES, GOLDEN, GREEDY, LAYOUTS, PROMPT, Results, gradient_error, load, ours, rows

from nanollama.config import ComputeConfig, ConfigError, ModelConfig, RopeScaling
from nanollama.export.weights import parameter_shapes, published_tensors
from nanollama.models.accounting import count_parameters
from nanollama.models.decoder import Decoder, head
from nanollama.models.families import FAMILIES, PRESETS, family_of, preset
from nanollama.models.families.published import read_config, write_config

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


# --- presets and configs ---


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


def test_gradients_are_compared_relative_to_each_tensor() -> None:
    one = {"a": np.array([1.0, 100.0]), "b": np.array([1e-3])}
    assert gradient_error({**one, "b": np.array([2e-3])}, one) == pytest.approx(1.0)
