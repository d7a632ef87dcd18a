"""`python -m data_pipeline.tokenizer --corpus=DIR --output=DIR --vocab-size=32000`: train and freeze it.

Owns the SentencePiece settings and the refusal to replace a frozen tokenizer. Knows nothing of packing. The sampling
rule is in `tokenization.sample`, measuring in `tokenization.tokenizer_report`, the frozen format in
`nanollama.data.tokenizer`.

Why these settings (measured on the quickstart corpus, vocabulary 8,192):
- Newlines stay in the training text as ordinary characters, so pieces such as ":\\n" and ")\\n\\n" exist:
  3.39 characters per token of Python code, against 3.19 with line-split input (newline as a byte) or with
  newline as a user-defined symbol.
- Pieces of spaces only are allowed, up to 16: indentation is one token. Without them 2.23.
- Pieces do not cross Unicode scripts. Allowing it gives 3.69 on code and 1.8 % less on text of another kind:
  the vocabulary fills with pieces like "(self".
- Identity normalization, byte fallback, no dummy prefix, spaces kept: decode(encode(text)) == text.
"""

import argparse
import dataclasses
import io
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from data_pipeline.curation.corpus_format import read_manifest, read_shard
from data_pipeline.engine.progress import Progress
from data_pipeline.engine.stage import WORK, Help, command, disk_full_explained, work_directory
from data_pipeline.tokenization import tokenizer_report
from data_pipeline.tokenization.sample import CHUNK_BYTES, plan_sample
from nanollama.data.files import DataError, Lock, read_json, sha256_json, write_atomic
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece
from nanollama.data.tokenizer import CARD_FILE, MANIFEST_FILE, MODEL_FILE, MODEL_FILES, Tokenizer
from nanollama.data.tokenizer_folder import copy_tokenizer, load_tokenizer

STAGE_VERSION = 2  # raise it when the same inputs would give another tokenizer
THREADS = 4  # fixed: the unigram trainer sums in an order that depends on it, and the file records it
PAD_PIECE = "<|pad|>"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Everything besides the corpus that decides the tokenizer's bytes."""

    vocab_size: int = 32_000
    algorithm: str = "bpe"
    seed: int = 0
    sample_mb: float = 100.0  # the trainer holds about ten times this in memory
    language_alpha: float = 1.0  # a language's part of a source is its bytes to this power; below 1 lifts rare ones
    holdout: float = 0.0  # share of the documents that is only measured on
    # Share of the text's characters that get a piece; rarer ones are spelled in bytes. All of them would cost 200 of
    # 8,192 pieces on the quickstart corpus. Chinese, Japanese and many scripts want 0.9995.
    character_coverage: float = 0.9999

    def check(self) -> None:
        """Raises DataError on values that cannot work."""
        if self.algorithm not in ("bpe", "unigram"):
            raise DataError(f"--algorithm={self.algorithm}: known are bpe and unigram.")
        if self.vocab_size < 270:
            raise DataError(
                f"--vocab-size={self.vocab_size}: 260 pieces are bytes and special tokens alone; give 270 or "
                "more.")
        if not 0 < self.sample_mb < math.inf:
            raise DataError(f"--sample-mb={self.sample_mb}: give a number above 0.")
        if not 0 <= self.language_alpha <= 1:
            raise DataError(f"--language-alpha={self.language_alpha}: give 0 (all alike) to 1 (as they come).")
        if not 0.9 <= self.character_coverage <= 1:
            raise DataError(f"--character-coverage={self.character_coverage}: give 0.9995 to 1.")
        if not 0 <= self.holdout < 1:
            raise DataError(f"--holdout={self.holdout}: give a number in [0, 1), such as 0.1.")


def build_tokenizer(corpus: str | os.PathLike[str],
                    output: str | os.PathLike[str],
                    config: TokenizerConfig,
                    *,
                    replace: bool = False) -> Tokenizer:
    """Train on `corpus` and freeze the result in `output`; what the same inputs made is returned as is.

    Errors: DataError, also when `output` holds another tokenizer and not `replace`.
    """
    config.check()
    output = Path(output)
    manifest, corpus_sha256 = read_manifest(corpus)
    fingerprint = sha256_json({
        "stage": "tokenizer", "version": STAGE_VERSION, "corpus": corpus_sha256,
        "config": dataclasses.asdict(config), "sentencepiece": sentencepiece.__version__
    })
    with Lock(output), disk_full_explained(output):
        existing = _existing(output, fingerprint, replace)
        if existing is not None:
            print(f"{output}: up to date, nothing to do", file=sys.stderr)
            return existing
        work = work_directory(output, fingerprint)
        with Progress("tokenizer") as progress:
            progress.update("sampling and training", None, force=True)
            model, sample = _train(corpus, manifest, config, progress)
            made = freeze_sentencepiece(work, model, algorithm=config.algorithm, corpus={
                "manifest_sha256": corpus_sha256, "mixture": manifest["mixture"]["file"],
                "fingerprint": fingerprint, "config": dataclasses.asdict(config),
                "sentencepiece": sentencepiece.__version__, "sample": sample})
            report = tokenizer_report.measure(made, corpus, manifest, progress, seed=config.seed,
                                              holdout=config.holdout)
        write_atomic(work / CARD_FILE, tokenizer_report.card(made, report))
        _put_in_place(output, made, replace)
        shutil.rmtree(output / WORK, ignore_errors=True)
    return load_tokenizer(output)


def _existing(output: Path, fingerprint: str, replace: bool) -> Tokenizer | None:
    """The tokenizer in `output` if it is the one asked for. Errors: DataError when it is another one."""
    path = output / MANIFEST_FILE
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("kind") not in MODEL_FILES:
        raise DataError(f"{path}: is there already and is no tokenizer's. This command would replace it: choose "
                        "another --output, an empty or a new directory.")
    if found.get("corpus", {}).get("fingerprint") == fingerprint and (output / CARD_FILE).exists():
        return load_tokenizer(output)
    if replace or found.get("corpus", {}).get("fingerprint") == fingerprint:
        return None
    raise DataError(
        f"{output}: holds a frozen tokenizer ({str(found.get('sha256'))[:16]}) made from another corpus or "
        "with other settings. Everything packed or trained with it would stop fitting. Choose another "
        "--output, or add --replace if nothing depends on it any more.")


def _put_in_place(output: Path, made: Tokenizer, replace: bool) -> None:
    """Copy the files into `output`, the manifest last; another model there needs `replace`."""
    model = output / MODEL_FILE
    if model.exists() and model.read_bytes() != (made.directory / MODEL_FILE).read_bytes() and not replace:
        raise DataError(
            f"{model}: another tokenizer is there, without its manifest. Choose another --output, or add "
            "--replace if nothing depends on it.")
    (output / MANIFEST_FILE).unlink(missing_ok=True)
    copy_tokenizer(made.directory, output)


def _train(corpus: str | os.PathLike[str], manifest: dict[str, Any], config: TokenizerConfig,
           progress: Progress) -> tuple[bytes, dict[str, Any]]:
    """(model bytes, account of the sample)."""
    plan = plan_sample(corpus, manifest, int(config.sample_mb * 1e6), seed=config.seed,
                       language_alpha=config.language_alpha, holdout=config.holdout)
    sample: dict[str, Any] = {**plan.described(), "documents": 0, "bytes": 0}
    failed: list[Exception] = []

    def sentences() -> Iterator[str]:
        try:
            for shard in manifest["shards"]:
                for row in read_shard(corpus, shard):
                    drawn = 0
                    for piece in plan.pieces(row, shard["dataset"]):
                        drawn += len(piece.encode())
                        yield piece
                    sample["documents"] += drawn > 0
                    sample["bytes"] += drawn
                    progress.update("sampling and training", None, f"{sample['bytes'] / 1e6:.1f} MB drawn")
        except Exception as error:  # the C++ caller would turn it into an abort
            failed.append(error)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences(),
                                                 model_writer=model,
                                                 **_settings(config))
    except RuntimeError as error:
        if not failed:
            raise _explained(error, config, sample) from error
    if failed:
        raise failed[0]
    return model.getvalue(), sample


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    return {
        "model_type": config.algorithm, "vocab_size": config.vocab_size, "hard_vocab_limit": True,
        "normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "byte_fallback": True, "character_coverage": config.character_coverage, "split_digits": True,
        "allow_whitespace_only_pieces": True, "max_sentence_length": 2 * CHUNK_BYTES,
        "input_sentence_size": 0, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "pad_piece": PAD_PIECE,
        "num_threads": THREADS, "minloglevel": 2
    }


def _explained(error: RuntimeError, config: TokenizerConfig, sample: dict[str, Any]) -> DataError:
    """SentencePiece's refusal in words that say which number would work."""
    text = str(error)
    what = f"--vocab-size={config.vocab_size}"
    if (largest := re.search(r"Please set it to a value <= (\d+)", text)) is not None:
        return DataError(
            f"{what}: the corpus has too little text for so many pieces ({sample['bytes']:,} bytes in "
            f"{sample['documents']:,} documents). The largest possible is {largest[1]}: use that or less, or "
            "a larger corpus.")
    if (smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text)) is not None:
        return DataError(f"{what}: too small for the characters of the corpus; the smallest possible is "
                         f"{int(smallest[1]) + 1}. Or lower --character-coverage={config.character_coverage:g}: rarer "
                         "characters are then spelled in bytes.")
    return DataError(f"{what}: SentencePiece stopped: {text}")


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.tokenizer",
                                     formatter_class=Help, description="Train and freeze a tokenizer.")
    parser.add_argument("--corpus", required=True, help="directory made by data_pipeline.corpus")
    parser.add_argument("--output", required=True, help="tokenizer directory to make")
    parser.add_argument("--vocab-size", type=int, default=TokenizerConfig.vocab_size, help="pieces")
    parser.add_argument("--algorithm",
                        default=TokenizerConfig.algorithm,
                        help="bpe or unigram (encodes four times faster)")
    parser.add_argument("--seed", type=int, default=TokenizerConfig.seed, help="of the sample")
    parser.add_argument("--sample-mb",
                        type=float,
                        default=TokenizerConfig.sample_mb,
                        help="text to train on, at most about")
    parser.add_argument("--language-alpha", type=float, default=TokenizerConfig.language_alpha,
                        help="languages by their bytes to this power: 1 as they come, 0.3 lifts rare ones")
    parser.add_argument("--holdout", type=float, default=TokenizerConfig.holdout,
                        help="share of the documents to measure on and never train on")
    parser.add_argument("--character-coverage", type=float, default=TokenizerConfig.character_coverage,
                        help="share of the text's characters that get a piece; 0.9995 for many scripts")
    parser.add_argument("--replace", action="store_true", help="replace another tokenizer in --output")
    arguments = parser.parse_args()
    start = time.monotonic()
    config = TokenizerConfig(arguments.vocab_size, arguments.algorithm, arguments.seed, arguments.sample_mb,
                             arguments.language_alpha, arguments.holdout, arguments.character_coverage)
    made = build_tokenizer(arguments.corpus, arguments.output, config, replace=arguments.replace)
    print((made.directory
           / CARD_FILE).read_text(encoding="utf-8").split("\n## ")[1].removeprefix("Measured\n\n"))
    print(f"tokenizer: {arguments.output}, {made.vocab_size} pieces, sha256 {made.sha256[:16]}, "
          f"{time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    command(_main)
