"""What the model writes while it trains: a few prompts, the same seeds every time, one file per step.

Knows nothing of the loop. The engine is the one that chat and evaluation use.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from nanollama.config import Config
from nanollama.data.files import write_json
from nanollama.data.tokenizer import Tokenizer
from nanollama.generation.command_line import DEFAULT
from nanollama.generation.engine import Engine
from nanollama.generation.text import sample
from nanollama.models.decoder import Params
from nanollama.models.lora import merge


class Sampler:
    """Continues `config.logging.sample_prompts`; the engine is built at the first use."""

    def __init__(self, config: Config, tokenizer: Tokenizer, mesh: Mesh, folder: Path):
        self._config, self._tokenizer, self._mesh, self._folder = config, tokenizer, mesh, folder
        self._engine: Engine | None = None
        self._merge = (lambda params: params) if config.lora is None else jax.jit(partial(merge, lora=config.lora))

    def write(self, step: int, params: Params) -> str:
        """Write `<folder>/<step>.json`; returns the first sample as a line for the console, or nothing."""
        logging = self._config.logging
        if not logging.sample_prompts:
            return ""
        params = self._merge(params)  # of adapters, into a copy: decoding reads plain weights
        if self._engine is None:
            self._engine = Engine(params, self._config.model, self._config.compute, mesh=self._mesh,
                                  context_length=self._config.data.sequence_length,
                                  stop_ids=(self._tokenizer.eos_id,), vocabulary=self._tokenizer.vocab_size)
        self._engine.set_params(params)
        prompts = [[*self._tokenizer.begin, *self._tokenizer.encode(prompt)] for prompt in logging.sample_prompts]
        sampling = [dataclasses.replace(DEFAULT, seed=seed) for seed in range(len(prompts))]
        completions = self._engine.generate(prompts, sampling, max_new_tokens=logging.sample_tokens, crop=True)
        rows = zip(logging.sample_prompts, completions, sampling, strict=True)
        samples = [sample(prompt, done, own, self._tokenizer) for prompt, done, own in rows]
        write_json(self._folder / f"{step}.json", {"step": step, "samples": samples})
        return f"sample at step {step}: {samples[0]['prompt']!r} -> {samples[0]['text']!r}\n"
