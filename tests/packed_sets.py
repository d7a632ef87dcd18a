"""Small packed sets and tokenizers for tests: written with the real codec, without data_pipeline.

    tokenizer = make_tokenizer(directory, vocab_size=300)
    packed = make_packed_set(directory, tokenizer=tokenizer, record_length=64, documents=200, seed=0)
    text = make_packed_set(directory, tokenizer=tokenizer, record_length=64, documents=["a text", "another"])

`make_packed_set` returns the directory; its tokenizer is frozen beside it only if you made it there.
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
from nanollama.data.tokenizer import Tokenizer, freeze

_SUBJECTS = ("the loader", "a model", "every row", "one document", "the tokenizer", "a checkpoint", "my cat", "some record")
_VERBS = ("reads", "packs", "holds", "forgets", "repeats", "shuffles", "counts", "eats")
_OBJECTS = ("tokens", "bytes", "the boundary", "twelve segments", "no padding", "its seed", "42 steps", "an apple pie")
_ENDS = (" slowly.", " at once!", " - or not?", ", again and again;\n", " (as numpy does).\n\n", ".\n\tThen it stops.\n")


def make_texts(count: int, seed: int = 0, words: tuple[int, int] = (1, 12)) -> list[str]:
    """Small texts of `words` sentences each, the same for the same seed."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        parts = (rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS))
        return " ".join(parts).capitalize() + str(rng.choice(_ENDS)) + ("" if rng.random() < 0.8 else f"{rng.integers(9999)} ")

    return ["".join(sentence() for _ in range(rng.integers(*words))) for _ in range(count)]


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
    """A frozen tokenizer of `vocab_size` (>= 300 for its 260 bytes and specials), trained once per session."""
    return freeze(directory, _tokenizer_model(vocab_size), algorithm="bpe", corpus={"made_by": "tests"})


def random_documents(count: int, vocab_size: int, seed: int, longest: int) -> list[np.ndarray]:
    """Documents of random ids, bos + ids + eos, of 2 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return [np.array([1, *rng.integers(4, vocab_size, rng.integers(0, longest - 1)), 2]) for _ in range(count)]


def make_packed_set(directory: str | os.PathLike[str], *, tokenizer: Tokenizer, record_length: int = 64,
                    documents: int | Sequence[str] | Sequence[np.ndarray] = 200, seed: int = 0, longest: int = 0,
                    sources: Sequence[str] = ("alpha", "beta"), validation: float = 0.1, files: int = 2) -> Path:
    """Write a packed set; document d is of source d % len(sources), every 1/validation-th goes to validation.

    `documents`: how many to make from `seed` (random ids, up to `longest` tokens, default half a record), or
    texts, or arrays of ids. Packed in order, so that a document longer than a record is cut like the real ones.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(documents, int):
        documents = random_documents(documents, tokenizer.vocab_size, seed, longest or record_length // 2)
    texts = [d if isinstance(d, str) else tokenizer.decode(d) for d in documents]
    ids = [tokenizer.encode_documents([d])[0] if isinstance(d, str) else np.asarray(d) for d in documents]
    # as data_pipeline.pack: a last piece of one token would be a row without a label
    ids = [d[:-1] if len(d) > record_length and len(d) % record_length == 1 else d for d in ids]
    every = round(1 / validation) if validation else 0
    split_of = ["validation" if every and d % every == every - 1 else "train" for d in range(len(ids))]
    manifest_files, splits, rows = [], {}, []
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split in ("train", "validation"):
        members = [d for d in range(len(ids)) if split_of[d] == split]
        records = _pack([(d, ids[d], d % len(sources)) for d in members], record_length)
        tokens = sum(len(ids[d]) for d in members)
        splits[split] = {"records": len(records), "tokens": tokens, "documents": len(members),
                         "padding": len(records) * record_length - tokens,
                         "bytes_of_text": sum(len(texts[d].encode()) for d in members)}
        counts[split] = {name: {"documents": 0, "tokens": 0, "bytes": 0, "characters": 0} for name in sources}
        first = {}
        for index, record in enumerate(records):
            for segment, document in enumerate(record.documents.tolist()):
                first.setdefault(document, (index, segment))
        for d in members:
            count = counts[split][sources[d % len(sources)]]
            for name, more in (("documents", 1), ("tokens", len(ids[d])), ("bytes", len(texts[d].encode())),
                               ("characters", len(texts[d]))):
                count[name] += more
            rows.append({"doc": d, "doc_id": f"document-{d}", "source": sources[d % len(sources)], "split": split,
                         "record": first[d][0], "segment": first[d][1], "tokens": len(ids[d]),
                         "bytes": len(texts[d].encode()), "sha256": "0" * 32, "meta": json.dumps({"number": d})})
        per_file = max(1, -(-len(records) // files))
        for number, start in enumerate(range(0, len(records), per_file)):
            path = directory / f"{split}-{number:05d}.array_record"
            writer = ArrayRecordWriter(str(path), packed.WRITER_OPTIONS)
            for record in records[start:start + per_file]:
                writer.write(encode_record(record))
            writer.close()
            manifest_files.append(_file(path, split, len(records[start:start + per_file])))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sorted(rows, key=lambda row: row["doc"])),
                                directory / packed.DOCUMENTS_FILE)
    manifest_files.append(_file(directory / packed.DOCUMENTS_FILE, None, len(rows)))
    identity = {name: getattr(tokenizer, name) for name in ("sha256", "normalized_sha256", "vocab_size", "bos_id",
                                                            "eos_id", "pad_id")}
    manifest = {"schema_version": packed.SCHEMA_VERSION, "kind": "packed", "tokenizer": identity,
                "record_length": record_length, "splits": splits, "sources": list(sources), "source_counts": counts,
                "files": manifest_files, "seed": seed}
    write_json(directory / packed.MANIFEST_FILE, {**manifest, "dataset_id": packed.dataset_id(manifest)})
    return directory


def _file(path: Path, split: str | None, records: int) -> dict[str, object]:
    return {"path": path.name, "split": split, "bytes": path.stat().st_size, "sha256": sha256_file(path),
            "records": records}


def _pack(documents: Sequence[tuple[int, np.ndarray, int]], record_length: int) -> list[Record]:
    """In order, next fit: a document that fits is not cut, a longer one starts a record and fills whole ones."""
    records, open_pieces, used = [], [], 0
    for number, ids, source in documents:
        if used + len(ids) > record_length and open_pieces:
            records.append(_record(open_pieces))
            open_pieces, used = [], 0
        while len(ids) > record_length:
            records.append(_record([(number, ids[:record_length], source)]))
            ids = ids[record_length:]
        open_pieces.append((number, ids, source))
        used += len(ids)
    return [*records, _record(open_pieces)] if open_pieces else records


def _record(pieces: Sequence[tuple[int, np.ndarray, int]]) -> Record:
    sizes = [len(ids) for _, ids, _ in pieces]
    return Record(tokens=np.concatenate([ids for _, ids, _ in pieces]), starts=np.cumsum([0, *sizes[:-1]]),
                  documents=np.array([number for number, _, _ in pieces]),
                  sources=np.array([source for _, _, source in pieces]))
