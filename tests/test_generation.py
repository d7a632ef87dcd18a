"""The sampling engine: the trainer's own probabilities, the same text in any batch, few programs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanollama.config import ComputeConfig, MeshConfig, ModelConfig
from nanollama.data.strict import FieldError
from nanollama.generation.engine import Completion, Engine, GenerationError
from nanollama.generation.sampling import SamplingConfig, rows_of, sample, truncate
from nanollama.models.decoder import Decoder, head, init_params
from nanollama.ops.losses import token_log_probs
from nanollama.parallel.mesh import make_mesh, sharding
from nanollama.training.state import logical_axes

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
COMPUTE = ComputeConfig()
CONTEXT = 96
PROMPTS = [[5, 6, 7], list(range(1, 20)), [9], [3, 60, 3, 60, 3], [5, 6, 7]]
GREEDY = SamplingConfig(temperature=0.0)


@functools.cache
def parameters() -> Any:
    generator = np.random.default_rng(0)
    abstract = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(MODEL, COMPUTE), 0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * generator.standard_normal(leaf.shape, np.float32)), abstract
    )


@functools.cache
def engine() -> Engine:
    return Engine(parameters(), MODEL, COMPUTE, context_length=CONTEXT)


@functools.cache
def trainer_forward(dtype: str = "float32") -> Any:
    decoder = Decoder(MODEL, dataclasses.replace(COMPUTE, dtype=dtype))  # type: ignore[arg-type]

    @jax.jit
    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden, _ = decoder.apply({"params": params}, tokens_BT, positions, jnp.zeros_like(tokens_BT))
        return token_log_probs(hidden, head(params), jnp.roll(tokens_BT, -1, axis=1), chunk_tokens=64)

    return run


def trainer_log_probs(
    prompts: Sequence[list[int]], completions: Sequence[Completion], dtype: str = "float32"
) -> list[np.ndarray]:
    """Of the completions' tokens, by the trainer's whole forward pass of prompt and completion."""
    rows = [[*prompt, *found.tokens] for prompt, found in zip(prompts, completions, strict=True)]
    tokens_BT = np.zeros((len(rows), CONTEXT), np.int32)
    for row, tokens in enumerate(rows):
        tokens_BT[row, : len(tokens)] = tokens
    log_probs_BT = np.asarray(trainer_forward(dtype)(parameters(), tokens_BT))
    return [log_probs_BT[row, len(prompt) - 1 : len(rows[row]) - 1] for row, prompt in enumerate(prompts)]


# --- sampling


def truncated_twin(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids that stay, by sorting: top-k first, then the shortest head of what is left that reaches top_p."""
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    probabilities = np.exp(logits[order] - logits[order[0]], dtype=np.float64)
    before = np.cumsum(probabilities / probabilities.sum()) - probabilities / probabilities.sum()
    return set(order[before < top_p].tolist()) if top_p < 1 else set(order.tolist())


def test_truncation_keeps_what_sorting_keeps() -> None:
    generator = np.random.default_rng(0)
    cases = [(k, p) for k in (0, 1, 3, 64, 900) for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)]
    logits = (4 * generator.standard_normal((len(cases), 64))).astype(np.float32)
    top_k, top_p = (np.array(column) for column in zip(*cases, strict=True))
    kept = np.asarray(jax.jit(truncate)(logits, top_k.astype(np.int32), top_p.astype(np.float32)))
    for row, (k, p) in enumerate(cases):
        assert set(np.flatnonzero(np.isfinite(kept[row]))) == truncated_twin(logits[row], k, p), (k, p)
        stay = np.isfinite(kept[row])
        assert np.array_equal(kept[row][stay], logits[row][stay])


def test_truncation_of_extreme_logits() -> None:
    logits = np.array([[-np.inf, 3e38, -3e38, 0.0, -0.0, 1e-45], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], np.float32)
    kept = np.asarray(truncate(logits, np.array([2, 1], np.int32), np.array([1.0, 1.0], np.float32)))
    assert np.isfinite(kept).tolist()[0] == [False, True, False, False, False, True]
    assert np.isfinite(kept).tolist()[1] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]  # equal ones stay together


def test_samples_follow_the_tempered_truncated_distribution() -> None:
    """4,000 seeds of one distribution: frequencies within five standard errors of the exact probabilities."""
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
    configs = [SamplingConfig(temperature=2.0, top_k=4, top_p=0.9, seed=seed) for seed in range(4000)]
    tokens, log_probs = jax.jit(sample)(np.tile(logits, (4000, 1)), rows_of(configs), np.int32(3))
    tempered = np.sqrt([0.5, 0.25, 0.15, 0.07])  # temperature 2, the best four
    tempered /= tempered.sum()
    head_ = tempered[: int(np.sum(np.cumsum(tempered) - tempered < 0.9))]
    expected = np.zeros(5)
    expected[: len(head_)] = head_ / head_.sum()
    counts = np.bincount(tokens, minlength=5) / 4000
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000))
    np.testing.assert_allclose(
        log_probs, logits[np.asarray(tokens)], rtol=1e-5
    )  # the model's own, untempered


def test_sampling_rows_do_not_know_each_other() -> None:
    logits = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    ways = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (1.0, 9, 0.9), (1.0, 1, 1.0)]
    configs = [SamplingConfig(temperature=t, top_k=k, top_p=p, seed=7) for t, k, p in ways]
    jitted = jax.jit(sample)
    together, _ = jitted(logits, rows_of(configs), np.int32(2))
    for row, config in enumerate(configs):
        one, _ = jitted(logits[row : row + 1], rows_of([config]), np.int32(2))
        assert int(one[0]) == int(together[row])
    assert int(together[0]) == logits[0].argmax() and int(together[5]) == logits[5].argmax()


def test_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = np.zeros((50, 8), np.float32)
    logits[:, 6:] = 50.0
    configs = [GREEDY] + [SamplingConfig(seed=seed) for seed in range(49)]
    tokens, _ = sample(jnp.asarray(logits), rows_of(configs), np.int32(0), vocabulary=6)
    assert set(np.asarray(tokens)) == set(range(6))


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("seed", -1)]
)
def test_bad_sampling_values_name_the_field(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=f"sampling.{field}: {value} is not"):
        engine().generate(PROMPTS, SamplingConfig(**{field: value}), max_new_tokens=2)  # type: ignore[arg-type]


# --- the engine and the trainer


def check_parity(engine: Engine, sampling: SamplingConfig, tolerance: float, dtype: str = "float32") -> None:
    """Batched prompts of unequal lengths: the sampler's log-probs are the trainer's."""
    found = engine.generate(PROMPTS, sampling, max_new_tokens=40)
    for got, wanted in zip(found, trainer_log_probs(PROMPTS, found, dtype), strict=True):
        assert len(got.tokens) == 40 and got.finish_reason == "length"
        np.testing.assert_allclose(got.log_probs, wanted, atol=tolerance)


def test_log_probs_equal_the_trainers_forward() -> None:
    check_parity(engine(), SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, seed=3), 1e-4)


def test_greedy_takes_the_trainers_most_likely_token() -> None:
    found = engine().generate(PROMPTS, GREEDY, max_new_tokens=12)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        others = [Completion([*completion.tokens[:-1], token], [], "") for token in range(MODEL.vocab_size)]
        last = [x[-1] for x in trainer_log_probs([prompt] * len(others), others)]
        assert int(np.argmax(last)) == completion.tokens[-1]


@pytest.mark.parametrize("mutant", ["positions", "padding"])
def test_parity_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Decoder.apply

    def wrong(self: Any, variables: Any, tokens: Any, positions: Any, first_key: Any, cache: Any) -> Any:
        if mutant == "positions" and tokens.shape[1] == 1:
            positions = jnp.broadcast_to(cache.write_index, positions.shape)  # counts the left padding too
        if mutant == "padding":
            first_key = jnp.zeros_like(first_key)  # sees the left padding
        return real(self, variables, tokens, positions, first_key, cache)

    monkeypatch.setattr(Decoder, "apply", wrong)
    with pytest.raises(AssertionError):
        check_parity(
            Engine(parameters(), MODEL, COMPUTE, context_length=CONTEXT), SamplingConfig(seed=3), 1e-4
        )


def test_bfloat16_engine_agrees_with_the_bfloat16_trainer() -> None:
    """Matrices cast once: the same numbers as the trainer's cast at every use, up to bfloat16 rounding."""
    compute = dataclasses.replace(COMPUTE, dtype="bfloat16")
    low = Engine(parameters(), MODEL, compute, context_length=CONTEXT)
    found = low.generate(PROMPTS, SamplingConfig(seed=3), max_new_tokens=20)
    wanted = trainer_log_probs(PROMPTS, found, "bfloat16")
    gaps = np.concatenate([np.abs(np.array(a.log_probs) - b) for a, b in zip(found, wanted, strict=True)])
    assert gaps.mean() < 0.05, f"mean gap {gaps.mean():.4f} nats"  # logits of this wide model have 8 bits


# --- the same text in any company


def test_text_does_not_depend_on_the_batch() -> None:
    configs = [SamplingConfig(temperature=1.0, seed=seed, top_p=0.9) for seed in (1, 2, 3, 4, 1)]
    together = engine().generate(PROMPTS, configs, max_new_tokens=24)
    assert together[0].tokens == together[4].tokens  # same prompt, same seed
    for row in (0, 2, 3):
        (alone,) = engine().generate([PROMPTS[row]], configs[row], max_new_tokens=24)
        assert alone.tokens == together[row].tokens
        np.testing.assert_allclose(alone.log_probs, together[row].log_probs, atol=1e-4)
    longer = engine().generate([*PROMPTS, list(range(1, 40))], [*configs, GREEDY], max_new_tokens=24)
    assert [row.tokens for row in longer[:5]] == [row.tokens for row in together]  # a longer prompt bucket
    other = engine().generate(PROMPTS[:1], dataclasses.replace(configs[0], seed=99), max_new_tokens=24)
    assert other[0].tokens != together[0].tokens


def test_many_prompts_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine(), "max_rows", 5)
    prompts = [[length % 7] * length for length in (28, 17, 26, 19, 24, 21, 22, 23, 20, 25)]
    found = engine().generate(prompts, GREEDY, max_new_tokens=5)
    for got, wanted in zip(found, trainer_log_probs(prompts, found), strict=True):
        np.testing.assert_allclose(got.log_probs, wanted, atol=1e-4)
    with pytest.raises(GenerationError, match="10 prompts in one stream of 5 rows"):
        engine().stream(prompts, GREEDY, max_new_tokens=5)


def test_stream_gives_what_generate_gives() -> None:
    config = SamplingConfig(seed=5)
    (whole,) = engine().generate([PROMPTS[1]], config, max_new_tokens=40)
    deltas = list(engine().stream([PROMPTS[1]], config, max_new_tokens=40, run_seconds=0.0))
    assert [token for delta in deltas for token in delta.tokens] == whole.tokens
    assert len(deltas) == 40 and [delta.finish_reason for delta in deltas] == [None] * 39 + ["length"]


def test_closing_a_stream_leaves_the_engine_usable() -> None:
    stream = engine().stream(PROMPTS[:1], GREEDY, max_new_tokens=40)
    first = next(stream)
    stream.close()
    assert engine().generate(PROMPTS[:1], GREEDY, max_new_tokens=1)[0].tokens == first.tokens


# --- ends


def test_a_stop_token_ends_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine().generate(PROMPTS, GREEDY, max_new_tokens=30)
    stop = plain[1].tokens[7]
    monkeypatch.setattr(engine(), "stop_ids", (63, stop))
    for before, after in zip(plain, engine().generate(PROMPTS, GREEDY, max_new_tokens=30), strict=True):
        ends = [number for number, token in enumerate(before.tokens) if token in (63, stop)]
        cut = ends[0] + 1 if ends else 30
        assert after.tokens == before.tokens[:cut]
        assert after.log_probs == before.log_probs[:cut]
        assert after.finish_reason == ("stop" if ends else "length")


def counting(length: int) -> list[int]:
    return [number % 64 for number in range(length)]


def test_rows_end_at_the_context() -> None:
    prompts = [counting(length) for length in (59, 3, CONTEXT - 1, 46, 47)]
    found = engine().generate(prompts, GREEDY, max_new_tokens=50)
    assert [len(row.tokens) for row in found] == [CONTEXT - 59, 50, 1, 50, 49]
    assert [row.finish_reason for row in found] == ["context", "length", "context", "length", "context"]
    for row, wanted in zip(found, trainer_log_probs(prompts, found), strict=True):
        np.testing.assert_allclose(row.log_probs, wanted, atol=1e-4)


def test_a_prompt_that_is_too_long_is_refused_or_cropped() -> None:
    long = counting(CONTEXT)
    with pytest.raises(GenerationError, match=rf"prompt 1 has {CONTEXT} tokens.*--crop"):
        engine().generate([[1], long], GREEDY, max_new_tokens=5)
    prompts = [long, long[-(CONTEXT - 5) :], [1], [2], [3]]
    cropped, end, *_ = engine().generate(prompts, GREEDY, max_new_tokens=5, crop=True)
    assert cropped.tokens == end.tokens and len(end.tokens) == 5
    half, *_ = engine().generate(prompts, GREEDY, max_new_tokens=1000, crop=True)
    assert len(half.tokens) == CONTEXT // 2 and half.finish_reason == "context"


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([[1], []], 5, "prompt 1 has no tokens"),
        ([[1, 64]], 5, "ids 1 to 64, the model's are 0 to 63"),
        ([[1, -1]], 5, "ids -1 to 1"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_bad_prompts_are_named(prompts: list[list[int]], tokens: int, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        engine().generate(prompts, GREEDY, max_new_tokens=tokens)
    with pytest.raises(GenerationError, match="2 sampling configs for 1 prompts"):
        engine().generate([[1]], [GREEDY, GREEDY], max_new_tokens=1)


def test_a_broken_model_is_an_error_not_a_text() -> None:
    try:
        engine().set_params({**parameters(), "final_norm": parameters()["final_norm"] * np.nan})
        with pytest.raises(GenerationError, match=r"not finite.*earlier checkpoint"):
            engine().generate(PROMPTS, GREEDY, max_new_tokens=3)
    finally:
        engine().set_params(parameters())


def test_no_prompts_no_work() -> None:
    assert engine().generate([], GREEDY, max_new_tokens=3) == []


# --- programs, devices


def test_few_programs_are_compiled_and_the_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_CACHE", "CACHE_AT_ONCE"):
        monkeypatch.setattr(f"nanollama.generation.engine.{name}", 16)
    fresh = Engine(parameters(), MODEL, COMPUTE, context_length=CONTEXT)
    prompts = [[1] * length for length in (1, 2, 9, 16)]
    found = fresh.generate(prompts, GREEDY, max_new_tokens=40)
    assert fresh.shapes == {("prefill", 4, 16), ("decode", 4, 32), ("decode", 4, 64)}
    for row, wanted in zip(found, trainer_log_probs(prompts, found), strict=True):
        np.testing.assert_allclose(row.log_probs, wanted, atol=1e-4)  # growing loses nothing
    before = set(fresh.shapes)
    fresh.generate([[1] * length for length in (3, 5, 11)], GREEDY, max_new_tokens=37)
    assert fresh.shapes == before


@pytest.mark.parametrize(("axes", "rows"), [
    (dict(fsdp=2, tensor=2), 3), (dict(context=2, stage=2), 1),
], ids=["fsdp-tensor", "context-stage"])  # fmt: skip
def test_sharded_parameters_give_the_same_text_without_implicit_transfers(axes: dict[str, int], rows: int) -> None:
    mesh = make_mesh(MeshConfig(data=1, **axes), jax.devices()[:4])
    sharded = jax.tree.map(
        lambda leaf, axes: jax.device_put(leaf, sharding(axes, leaf.shape, mesh)),
        parameters(), logical_axes(MODEL), is_leaf=lambda leaf: isinstance(leaf, jax.Array),
    )  # fmt: skip
    cut = Engine(sharded, MODEL, COMPUTE, context_length=CONTEXT, mesh=mesh)
    config = SamplingConfig(seed=11, top_p=0.9)
    with jax.transfer_guard("disallow"):
        found = cut.generate(PROMPTS[:rows], config, max_new_tokens=12)
    for got, wanted in zip(found, engine().generate(PROMPTS[:rows], config, max_new_tokens=12), strict=True):
        assert got.tokens == wanted.tokens
        np.testing.assert_allclose(got.log_probs, wanted.log_probs, atol=1e-4)


def test_new_parameters_replace_the_old() -> None:
    before = engine().generate(PROMPTS, GREEDY, max_new_tokens=8)
    try:
        engine().set_params(jax.tree.map(lambda leaf: leaf[..., ::-1], parameters()))
        assert engine().generate(PROMPTS, GREEDY, max_new_tokens=8)[0].tokens != before[0].tokens
    finally:
        engine().set_params(parameters())
    assert engine().generate(PROMPTS, GREEDY, max_new_tokens=8) == before
