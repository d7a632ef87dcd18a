"""The sampling engine: prompts to completions, batched, on any mesh, streamed.

One model code with the trainer (DESIGN law 14). Owns batching, shape buckets, limits and the stream: rows,
prompts and caches come in powers of two, so that few programs are compiled; the device writes up to CHUNK
tokens before the host looks. Knows tokens, not text.
"""

import dataclasses
import functools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanollama.config import ComputeConfig, ModelConfig
from nanollama.generation import decode
from nanollama.generation.decode import CHUNK, News, Plan, Program, State
from nanollama.generation.sampling import Rows, SamplingConfig, rows_of
from nanollama.models.decoder import Decoder, Params
from nanollama.parallel.mesh import shards

STREAM_SECONDS = 0.1  # a stream's runs are as long as fits in this: text flows, and Ctrl-C is heard
MIN_PROMPT, MIN_CACHE, MIN_STOPS = 16, 256, 4  # smallest buckets: below, a compilation costs more than it saves
CACHE_AT_ONCE = 1024  # a cache up to this long is made at once; a longer one doubles as it fills


class GenerationError(ValueError):
    """A prompt or a model that cannot be used; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt."""

    tokens: list[int]  # without the prompt; a stop token is the last of them
    log_probs: list[float]  # nats, of each token under the model itself: untempered, whole vocabulary
    finish_reason: str  # "stop" (a stop token), "length" (max_new_tokens) or "context" (no room left)


class Delta(NamedTuple):
    """A run of new tokens of one row of a stream."""

    row: int
    tokens: list[int]
    log_probs: list[float]
    finish_reason: str | None  # with the row's last run


class Engine:
    """A model ready to write. Results do not depend on how prompts are batched."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        compute: ComputeConfig | None = None,
        *,
        context_length: int,
        stop_ids: Sequence[int] = (),
        vocabulary: int | None = None,
        mesh: Mesh | None = None,
        max_rows: int = 64,
    ):
        """context_length: most tokens a row may have, prompt included. stop_ids: tokens that end a row.
        vocabulary: ids from here on are never chosen (they only pad the model's). mesh: where `params` are
        sharded. max_rows: prompts written at one time.
        """
        compute = dataclasses.replace(compute or ComputeConfig(), remat="none")
        if compute.moe == "capacity":  # would drop by what else is in the batch
            compute = dataclasses.replace(compute, moe="auto")
        self.model, self.context_length, self.mesh, self.max_rows = model, context_length, mesh, max_rows
        self.stop_ids = tuple(stop_ids)
        self.shapes: set[tuple[Any, ...]] = set()  # of the programs compiled so far
        self._dtype = jnp.dtype(compute.dtype)
        program = Program(Decoder(model, compute), vocabulary or model.vocab_size, mesh)
        self._prefill = jax.jit(functools.partial(decode.prefill, program))
        self._decode = jax.jit(functools.partial(decode.decode, program), donate_argnums=1)
        self._grow = jax.jit(decode.grow, static_argnums=1)
        self._ready = jax.jit(functools.partial(decode.ready, dtype=self._dtype))
        self.set_params(params)

    def set_params(self, params: Params) -> None:
        """Use other parameters of the same shapes, as the trainer has them; takes a copy."""
        self._params = self._ready(params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        max_new_tokens: int,
        crop: bool = False,
    ) -> list[Completion]:
        """A completion of each prompt, in their order. sampling: one for all, or one each.

        The same prompt and sampling config give the same tokens whatever else is in the list. crop: see
        `stream`.
        Errors: GenerationError, FieldError.
        """
        configs, prompts = _one_each(sampling, len(prompts)), self._fitted(prompts, max_new_tokens, crop)
        found = [Completion([], [], "") for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # alike lengths pad less
        for low in range(0, len(order), self.max_rows):
            chosen = order[low : low + self.max_rows]
            deltas = self.stream(
                [prompts[row] for row in chosen],
                [configs[row] for row in chosen],
                max_new_tokens=max_new_tokens,
                run_seconds=float("inf"),
            )
            for delta in deltas:
                before = found[chosen[delta.row]]
                found[chosen[delta.row]] = Completion(
                    before.tokens + delta.tokens,
                    before.log_probs + delta.log_probs,
                    delta.finish_reason or "",
                )
        return found

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        *,
        max_new_tokens: int,
        crop: bool = False,
        run_seconds: float = STREAM_SECONDS,
    ) -> Generator[Delta]:
        """Runs of new tokens of up to `max_rows` prompts, as they are made; closing the iterator stops.

        crop: of a prompt too long for max_new_tokens to follow, keep the end (at least half the context);
        without it, a prompt that leaves no room at all is refused, and others stop at the context's end.
        Errors: GenerationError, FieldError, both before any work.
        """
        rows = rows_of(_one_each(sampling, len(prompts)))
        prompts = self._fitted(prompts, max_new_tokens, crop)
        if len(prompts) > self.max_rows:
            raise GenerationError(
                f"{len(prompts)} prompts in one stream of {self.max_rows} rows. Use generate."
            )
        limits = [min(max_new_tokens, self.context_length - len(prompt)) for prompt in prompts]
        reasons = ["length" if limit == max_new_tokens else "context" for limit in limits]
        return self._stream(prompts, rows, limits, reasons, run_seconds)

    def _fitted(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, crop: bool
    ) -> Sequence[Sequence[int]]:
        """The prompts, cropped if asked for and checked."""
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {max_new_tokens}. Ask for 1 or more.")
        if crop:
            kept = max(self.context_length - max_new_tokens, self.context_length // 2, 1)
            prompts = [prompt[-kept:] for prompt in prompts]
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise GenerationError(f"prompt {row} has no tokens. Begin it with the bos token.")
            if len(prompt) >= self.context_length:
                raise GenerationError(
                    f"prompt {row} has {len(prompt)} tokens, and prompt and text together may have "
                    f"{self.context_length}. Shorten the prompt, or crop it to its end (crop=True, --crop)."
                )
            if not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
                raise GenerationError(
                    f"prompt {row} has ids {min(prompt)} to {max(prompt)}, the model's are 0 to "
                    f"{self.model.vocab_size - 1}. Encode it with the checkpoint's own tokenizer."
                )
        return prompts

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Rows,
        limits: list[int],
        reasons: list[str],
        run_seconds: float,
    ) -> Generator[Delta]:
        if not prompts:
            return
        batch = self._bucket_rows(len(prompts))
        prompt_length = power_of_two(max(map(len, prompts)), MIN_PROMPT)
        tokens_BP, lengths_B = np.zeros((batch, prompt_length), np.int32), np.ones(batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BP[row, prompt_length - len(prompt) :] = prompt
            lengths_B[row] = len(prompt)
        padding = batch - len(prompts)
        rows = Rows(*(np.pad(values_B, (0, padding), mode="edge") for values_B in rows))
        limit_B = np.array(limits + [0] * padding, np.int32)
        stops = np.full(power_of_two(len(self.stop_ids), MIN_STOPS), decode.NOTHING, np.int32)
        stops[: len(self.stop_ids)] = self.stop_ids
        plan = Plan(*self._put((rows, limit_B, stops)))

        self.shapes.add(("prefill", batch, prompt_length))
        state, news = self._prefill(self._params, *self._put((tokens_BP, lengths_B)), plan)
        left = dict(enumerate(limits))
        yield from self._deltas(news, left, reasons)
        made, run, last = 1, 1, max(limits)
        while left:
            run = min(run, last - made)
            state = self._with_room(state, prompt_length + made + run - 1, prompt_length + last - 1)
            self.shapes.add(("decode", batch, decode.cache_length(state)))
            started = time.perf_counter()
            state, news = self._decode(self._params, state, plan, self._put(np.int32(run)))
            yield from self._deltas(news, left, reasons)
            made += run
            run = _next_run(run, time.perf_counter() - started, run_seconds)

    def _deltas(self, news: News, left: dict[int, int], reasons: list[str]) -> Iterator[Delta]:
        """News of each unfinished row. `left`: tokens it may still write; finished rows are taken out."""
        tokens_CB, log_probs_CB = jax.device_get(news)
        for row in list(left):
            count = int(np.count_nonzero(tokens_CB[:, row] != decode.NOTHING))
            tokens, log_probs = tokens_CB[:count, row].tolist(), log_probs_CB[:count, row].tolist()
            if not np.all(np.isfinite(log_probs)):
                raise GenerationError(
                    "the model's probabilities are not finite: its parameters are broken, or too large for "
                    f"{self._dtype.name}. Use an earlier checkpoint, or compute in float32."
                )
            left[row] -= count
            reason = (
                "stop" if tokens and tokens[-1] in self.stop_ids else reasons[row] if not left[row] else None
            )
            if reason:
                del left[row]
            yield Delta(row, tokens, log_probs, reason)

    def _with_room(self, state: State, needed: int, most: int) -> State:
        """A cache of at least `needed` slots; `most` is what it may need in the end."""
        length = decode.cache_length(state)
        if needed <= length:
            return state
        at_once = min(power_of_two(most, MIN_CACHE), CACHE_AT_ONCE)
        return self._grow(state, power_of_two(needed, at_once))

    def _bucket_rows(self, count: int) -> int:
        """A power of two, and as many rows as the mesh cuts a batch into, times a whole number."""
        parts = 1 if self.mesh is None else shards("batch", self.mesh)
        return -(-power_of_two(count, 1) // parts) * parts

    def _put(self, arrays: Any) -> Any:
        """To the device, or whole to every device of the mesh: said explicitly, for transfer guards."""
        return jax.device_put(
            arrays, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        )


def power_of_two(size: int, smallest: int) -> int:
    """The least power of two that is at least `size` and `smallest`."""
    return 1 << (max(size, smallest) - 1).bit_length()


def _next_run(run: int, seconds: float, wanted: float) -> int:
    """Twice the tokens while that should fit in the wanted time, half when it did not."""
    if 2 * seconds <= wanted:
        return min(2 * run, CHUNK)
    return max(1, run // 2) if seconds > wanted else run


def _one_each(sampling: SamplingConfig | Sequence[SamplingConfig] | None, count: int) -> list[SamplingConfig]:
    if sampling is None or isinstance(sampling, SamplingConfig):
        return [sampling or SamplingConfig()] * count
    if len(sampling) != count:
        raise GenerationError(f"{len(sampling)} sampling configs for {count} prompts. Give one, or one each.")
    return list(sampling)
