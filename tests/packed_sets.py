"""Small packed sets and tokenizers for tests: written with the real codec, without data_pipeline.

    tokenizer = make_tokenizer(directory / "tokenizer")
    path = make_packed_set(directory / "set", tokenizer=tokenizer, record_length=64, documents=200, seed=0)
    path = make_packed_set(directory / "texts", tokenizer=tokenizer, documents=["a text", "another"])
"""

import functools
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
from array_record.python.array_record_module import ArrayRecordWriter

from nanollama.data import packed
from nanollama.data.files import sha256_file, write_json
from nanollama.data.format import Record, encode_record
from nanollama.data.sentencepiece_tokenizer import freeze_sentencepiece
from nanollama.data.tokenizer import Tokenizer

_SUBJECTS = ("the loader", "a model", "every row", "one document", "the tokenizer", "a checkpoint", "my cat")
_VERBS = ("reads", "packs", "holds", "forgets", "repeats", "shuffles", "counts", "eats")
_OBJECTS = ("tokens", "bytes", "the boundary", "twelve segments", "no padding", "its seed", "42 steps", "pie")
_ENDS = (" slowly.", " at once!", " - or not?", ", again;\n", " (numpy does).\n\n", ".\n\tThen it stops.\n")


def make_texts(count: int, seed: int = 0, sentences: tuple[int, int] = (1, 12)) -> list[str]:
    """`count` small texts, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        words = " ".join((rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS)))
        number = f"{rng.integers(9999)} " if rng.random() < 0.2 else ""
        return words.capitalize() + str(rng.choice(_ENDS)) + number

    return ["".join(sentence() for _ in range(rng.integers(*sentences))) for _ in range(count)]


@functools.cache
def _tokenizer_model(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(make_texts(400, seed=1)).split("\n")), model_writer=model,
        vocab_size=vocab_size, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False, num_threads=1,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2)
    return model.getvalue()


def make_tokenizer(directory: str | os.PathLike[str], vocab_size: int = 400) -> Tokenizer:
    """A frozen tokenizer of `vocab_size` (310 or more: it has all bytes), trained once per test session."""
    return freeze_sentencepiece(directory, _tokenizer_model(vocab_size), algorithm="bpe", corpus={"made_by": "tests"})


def random_documents(count: int, vocab_size: int, seed: int, longest: int) -> list[np.ndarray]:
    """Documents of random ids, bos + ids + eos, of 2 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(0, longest - 1) for _ in range(count)]
    return [np.array([1, *rng.integers(4, vocab_size, size), 2]) for size in sizes]


def make_packed_set(directory: str | os.PathLike[str], *, tokenizer: Tokenizer, record_length: int = 64,
                    documents: int | Sequence[str] | Sequence[np.ndarray] = 200, seed: int = 0,
                    longest: int = 0, sources: Sequence[str] = ("alpha", "beta"), validation: float = 0.1,
                    files: int = 2) -> Path:
    """Write a packed set and return its directory.

    `documents`: how many to make from `seed` (random ids, up to `longest` tokens, default half a record), or
    texts, or arrays of ids. Document d is of source d % len(sources); every (1 / validation)-th is held out.
    Documents are packed in order, one longer than a record is cut as data_pipeline.pack cuts it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(documents, int):
        documents = random_documents(documents, tokenizer.vocab_size, seed, longest or record_length // 2)
    texts = [d if isinstance(d, str) else tokenizer.decode(d) for d in documents]
    ids = [tokenizer.encode_documents([d])[0] if isinstance(d, str) else np.asarray(d) for d in documents]
    # a last piece of one token could be a whole record, which would have no label
    ids = [d[:-1] if len(d) > record_length and len(d) % record_length == 1 else d for d in ids]
    every = round(1 / validation) if validation else 0
    manifest: dict = {
        "schema_version": packed.SCHEMA_VERSION, "kind": "packed", "record_length": record_length,
        "tokenizer": {name: getattr(tokenizer, name) for name in
                      ("sha256", "normalized_sha256", "vocab_size", "bos_id", "eos_id", "pad_id")},
        "sources": list(sources), "seed": seed, "splits": {}, "source_counts": {}, "files": []}
    split_of = ["validation" if every and d % every == every - 1 else "train" for d in range(len(ids))]
    rows = [{"doc": d, "doc_id": f"document-{d}", "source": sources[d % len(sources)], "split": split_of[d],
             "record": 0, "segment": 0, "tokens": len(ids[d]), "bytes": len(texts[d].encode()),
             "characters": len(texts[d]), "sha256": "0" * 32, "meta": json.dumps({"number": d})}
            for d in range(len(ids))]
    for split in ("train", "validation"):
        members = [row for row in rows if row["split"] == split]
        pieces = [(row["doc"], ids[row["doc"]], row["doc"] % len(sources)) for row in members]
        records = _pack(pieces, record_length)
        for index in reversed(range(len(records))):
            for segment, document in enumerate(records[index].documents.tolist()):
                rows[document].update(record=index, segment=segment)
        total = _totals(members)
        manifest["splits"][split] = {
            "records": len(records), "tokens": total["tokens"], "documents": total["documents"],
            "padding": len(records) * record_length - total["tokens"], "bytes_of_text": total["bytes"]}
        manifest["source_counts"][split] = {
            source: _totals([row for row in members if row["source"] == source]) for source in sources}
        manifest["files"] += _write_records(directory, split, records, files)
    table = pyarrow.Table.from_pylist(rows).drop_columns(["characters"])
    pyarrow.parquet.write_table(table, directory / packed.DOCUMENTS_FILE)
    manifest["files"].append(_file(directory / packed.DOCUMENTS_FILE, None, len(rows)))
    write_json(directory / packed.MANIFEST_FILE, {**manifest, "dataset_id": packed.dataset_id(manifest)})
    return directory


def _totals(rows: Sequence[dict]) -> dict[str, int]:
    return {"documents": len(rows),
            **{what: sum(row[what] for row in rows) for what in ("tokens", "bytes", "characters")}}


def _write_records(directory: Path, split: str, records: Sequence[Record], files: int) -> list[dict]:
    per_file, written = max(1, -(-len(records) // files)), []
    for number, start in enumerate(range(0, len(records), per_file)):
        path = directory / f"{split}-{number:05d}.array_record"
        writer = ArrayRecordWriter(str(path), packed.WRITER_OPTIONS)
        for record in records[start:start + per_file]:
            writer.write(encode_record(record))
        writer.close()
        written.append(_file(path, split, len(records[start:start + per_file])))
    return written


def _file(path: Path, split: str | None, records: int) -> dict:
    return {"path": path.name, "split": split, "bytes": path.stat().st_size, "sha256": sha256_file(path),
            "records": records}


def _pack(documents: Sequence[tuple[int, np.ndarray, int]], record_length: int) -> list[Record]:
    """Next fit: a document that fits is not cut, a longer one starts a record and fills whole ones."""
    records: list[Record] = []
    pieces: list[tuple[int, np.ndarray, int]] = []
    for number, ids, source in documents:
        if pieces and sum(len(ids) for _, ids, _ in pieces) + len(ids) > record_length:
            records.append(_record(pieces))
            pieces = []
        while len(ids) > record_length:
            records.append(_record([(number, ids[:record_length], source)]))
            ids = ids[record_length:]
        pieces.append((number, ids, source))
    return [*records, _record(pieces)] if pieces else records


def _record(pieces: Sequence[tuple[int, np.ndarray, int]]) -> Record:
    numbers, tokens, sources = zip(*pieces, strict=True)
    starts = np.cumsum([0, *(len(ids) for ids in tokens[:-1])])
    return Record(np.concatenate(tokens), starts, np.array(numbers), np.array(sources))
