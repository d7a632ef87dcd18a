"""`python -m nanollama.generate --checkpoint=RUN --prompt="Once upon"`: let a model go on from prompts.

Prints the texts, and writes them to samples.json under --output. A prompt is encoded as the beginning of a
document: bos, then its tokens. Prompt number i is sampled with seed --seed + i, so a text can be made again from
its own entry in samples.json, whatever prompts are beside it.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanollama.data.files import DataError, read_json, write_json
from nanollama.generation import command_line, text
from nanollama.generation.engine import GenerationError
from nanollama.generation.loading import LoadedModel, load_model
from nanollama.generation.sampling import SamplingConfig
from nanollama.parallel import backend


def generate(
    model: LoadedModel, prompts: Sequence[str], sampling: SamplingConfig, max_new_tokens: int, crop: bool = False
) -> list[dict[str, Any]]:
    """One entry of samples.json per prompt; `text` is what follows the prompt.

    Errors: GenerationError names a prompt that is longer than the context, unless `crop` keeps its end.
    """
    own = [dataclasses.replace(sampling, seed=(sampling.seed + number) % (1 << 32)) for number in range(len(prompts))]
    completions = command_line.engine(model).generate(
        [command_line.begin(model.tokenizer, prompt) for prompt in prompts],
        own,
        max_new_tokens=max_new_tokens,
        crop=crop,
    )
    rows = zip(prompts, completions, own, strict=True)
    return [text.sample(prompt, done, config, model.tokenizer) for prompt, done, config in rows]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .json file (a list of strings, or of objects with a field "prompt") or the lines of a text file.

    Errors: DataError with file and line or entry.
    """
    if not path.is_file():
        raise DataError(f"--prompts: {path}: no such file. Give a .json list, or a text file of one prompt a line.")
    try:
        if path.suffix != ".json":
            lines = path.read_text(encoding="utf-8").split("\n")
            return [line.removesuffix("\r") for line in lines if line.strip()]
        entries = read_json(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Convert it, for example with iconv.") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: is not a list. Write a list of strings, or of objects with a field 'prompt'.")
    return [_prompt_of(entry, f"{path}: entry {number}") for number, entry in enumerate(entries)]


def _prompt_of(entry: Any, where: str) -> str:
    prompt = entry.get("prompt") if isinstance(entry, dict) else entry
    if not isinstance(prompt, str):
        raise DataError(f"{where} is {entry!r}. Make it a string, or an object with a field 'prompt'.")
    return prompt


def show(sample: dict[str, Any], number: int, count: int) -> str:
    """A sample as a person reads it: the prompt, and after a bar what the model wrote."""
    both = sample["prompt"] + "\u2502" + sample["text"]
    note = f"seed {sample['seed']}, {sample['tokens']} tokens, {sample['finish_reason']}"
    return f"--- sample {number + 1} of {count}: {note}\n{text.printable(both) if sys.stdout.isatty() else both}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 when prompts or checkpoint cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m nanollama.generate", description=__doc__.split("\n")[0])
    command_line.add_arguments(parser)
    parser.add_argument("--prompt", action="extend", nargs="+", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=".json list, or text with one prompt a line")
    parser.add_argument("--crop", action="store_true", help="keep the end of a prompt that is too long")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where samples.json is written")
    options = parser.parse_args(arguments)
    command_line.forgive_encoding(sys.stdout)
    try:
        sampling = command_line.sampling(options)
        prompts = options.prompt + (read_prompts(options.prompts) if options.prompts else [])
        if not prompts:
            raise GenerationError('no prompt. Give --prompt="a text" or --prompts=FILE; an empty text is one too.')
        backend.start()
        model = load_model(options.checkpoint, options.tokenizer)
        started = time.perf_counter()
        samples = generate(model, prompts, sampling, options.max_new_tokens, options.crop)
        seconds = time.perf_counter() - started
    except command_line.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, sample in enumerate(samples):
        print(show(sample, number, len(samples)), end="\n\n")
    if options.output:
        write_json(options.output / "samples.json", {"samples": samples, "checkpoint": model.describe()})
    tokens = sum(sample["tokens"] for sample in samples)
    print(json.dumps({"samples": len(samples), "tokens": tokens, "seconds": round(seconds, 2), "step": model.step}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
