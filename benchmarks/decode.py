"""Tokens per second of generation: reading prompts, then writing with the KV cache; beside transformers.

    python benchmarks/decode.py [--model=llama-23m] [--batches=1,8] [--prompt=128] [--tokens=128] [--dtype=float32]
    python benchmarks/decode.py --peer-python=PYTHON      # PYTHON can import torch and transformers

`nanollama.generation`'s engine, as chat and evaluation use it, and `LlamaForCausalLM.generate` (SDPA, its dynamic
cache) on the same shapes, greedy, random weights, no stop token. The first call of each shape is not timed. GB/s: what
a written token must read, weights and cache, times tokens: writing is bound by memory, not by arithmetic.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import RESULTS, write
from nanollama.config import ComputeConfig, ModelConfig
from nanollama.generation.engine import Engine
from nanollama.generation.sampling import SamplingConfig
from nanollama.models.accounting import count_parameters, kv_cache_bytes
from nanollama.models.decoder import Decoder, init_params
from nanollama.models.families import preset
from nanollama.parallel import backend

ROOT = Path(__file__).resolve().parent.parent

TINY = ModelConfig(256, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)


def one(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds to every row's first token, and from there to the last."""
    start, first, written = time.perf_counter(), 0.0, 0
    deltas = engine.stream(prompts, SamplingConfig(temperature=0), max_new_tokens=tokens, run_seconds=float("inf"))
    for number, delta in enumerate(deltas):
        written += len(delta.tokens)
        if number == len(prompts) - 1:
            first = time.perf_counter() - start
    assert written == tokens * len(prompts), "a row ended early: the figures would be too good"
    return first, time.perf_counter() - start - first


def figures(batch: int, prompt: int, tokens: int, times: list[tuple[float, float]]) -> dict[str, float]:
    """Of the fastest run: the one least disturbed."""
    first, rest = (min(part) for part in zip(*times, strict=True))
    return {
        "batch": batch,
        "prefill_seconds": round(first, 5),
        "prefill_tokens_per_second": round(batch * prompt / first),
        "decode_tokens_per_second": round(batch * (tokens - 1) / rest, 1),
        "milliseconds_per_token": round(rest / (tokens - 1) * 1e3, 3),
    }


def ours(model: ModelConfig, options: argparse.Namespace) -> list[dict[str, float]]:
    """Our engine at each batch size."""
    boxed = jax.jit(lambda seed: nn.meta.unbox(init_params(Decoder(model, ComputeConfig()), seed)))(0)
    compute = ComputeConfig(dtype=options.dtype)
    length = options.prompt + options.tokens
    engine = Engine(boxed, model, compute, context_length=length, max_rows=max(options.batches))
    generator, entries, itemsize = np.random.default_rng(0), [], jnp.dtype(options.dtype).itemsize
    count = count_parameters(model)
    weights = (count.total - (0 if model.tie_embeddings else count.embedding)) * itemsize  # a table's row is nothing
    for batch in options.batches:
        prompts = generator.integers(model.vocab_size, size=(batch, options.prompt)).tolist()
        times = [one(engine, prompts, options.tokens) for _ in range(1 + options.rounds)][1:]
        entry = figures(batch, options.prompt, options.tokens, times)
        cache = kv_cache_bytes(model, options.prompt + options.tokens // 2, itemsize) * batch
        entry["gb_per_second"] = round((weights + cache) / entry["milliseconds_per_token"] / 1e6, 1)
        entries.append(entry)
    return entries


def theirs(model: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """transformers, in a process and with a Python of its own; why not, where it fails."""
    asked = {"model": dataclasses.asdict(model), "batches": options.batches, "prompt": options.prompt,
             "tokens": options.tokens, "rounds": options.rounds, "dtype": options.dtype}  # fmt: skip
    command = [str(options.peer_python), str(ROOT / "benchmarks" / "torch_decode.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    times = answer.pop("times")
    runs = zip(options.batches, times, strict=True)
    return {**answer, "runs": [figures(batch, options.prompt, options.tokens, each) for batch, each in runs]}


def show(name: str, entries: list[dict[str, float]]) -> None:
    for entry in entries:
        print(f"{name:<14}{entry['batch']:>6}{entry['prefill_tokens_per_second']:>12,}"
              f"{entry['decode_tokens_per_second']:>12,.1f}{entry['milliseconds_per_token']:>11.2f}"
              f"{entry.get('gb_per_second', float('nan')):>8.1f}", flush=True)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-23m", help="a preset, or tiny")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer-python", type=Path, help="a Python that can import torch and transformers")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    options = parser.parse_args(arguments)
    model = TINY if options.model == "tiny" else ModelConfig(**preset(options.model))
    result: dict[str, Any] = {"model": options.model, "prompt": options.prompt, "tokens": options.tokens,
                              "dtype": options.dtype}  # fmt: skip
    if options.peer_python:  # first: on a GPU, JAX takes the memory once it has begun
        result["transformers"] = theirs(model, options)
    backend.start()
    print(f"{options.model}, {options.dtype}, prompts of {options.prompt}, {options.tokens} new tokens a row")
    print(f"{'':<14}{'rows':>6}{'read tok/s':>12}{'write tok/s':>12}{'ms a step':>11}{'GB/s':>8}")
    result["nanollama"] = ours(model, options)
    show("nanollama", result["nanollama"])
    if "runs" in result.get("transformers", {}):
        show("transformers", result["transformers"]["runs"])
    elif options.peer_python:
        print(f"transformers: {result['transformers']['failed']}")
    write(options.out, "greedy generation, random weights; best of the rounds", result, "jax", "flax", "numpy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
