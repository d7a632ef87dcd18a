"""`python -m nanollama.export.import_tokenizer --source=FILE|DIR --output=DIR`: a published tokenizer, frozen.

FILE is a tiktoken file (with --kind, also gzipped) or a tokenizer.json (with --eos); DIR a folder as transformers
writes it. What comes out is used like one trained here: to pack data, to train and to chat.
"""

import argparse
import gzip
import sys
from pathlib import Path

from nanollama.config import ConfigError
from nanollama.data.files import DataError
from nanollama.data.hub_tokenizer import begins_with, freeze_tokenizer_json
from nanollama.data.tokenizer import MANIFEST_FILE, Tokenizer
from nanollama.export.import_huggingface import freeze_published
from nanollama.export.tiktoken_file import KINDS, tokenizer_json_of_ranks


def import_tokenizer(
    source: str | Path,
    output: str | Path,
    *,
    kind: str = "",
    bos: str | None = None,
    eos: str | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """Freeze the tokenizer in `source` in the folder `output`, which must hold none.

    Errors: DataError names file and line, or the token that is missing; nothing is written then.
    """
    source, output = Path(source), Path(output)
    if (output / MANIFEST_FILE).exists():
        raise DataError(f"{output}: holds a frozen tokenizer already. Choose another --output.")
    if source.is_dir():
        return freeze_published(source, output)
    if not source.is_file():
        raise DataError(f"--source={source}: no such file or folder.")
    try:
        data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{source}: {error}: truncated or no gzip file. Download it again.") from error
    if kind:
        model, about = tokenizer_json_of_ranks(data, kind, str(source)), KINDS[kind]
        stops = [about.size + about.special.index(token) for token in about.stops]
        bos, eos = bos or about.bos, eos or about.eos
    else:
        model, stops = data, []
        if not data.lstrip().startswith(b"{"):
            raise DataError(f"{source}: not a tokenizer.json. A tiktoken file needs --kind ({', '.join(KINDS)}).")
        if eos is None:
            raise DataError(f"{source}: a tokenizer.json does not say which token ends a text. Give --eos.")
        bos = bos or begins_with(model)
    return freeze_tokenizer_json(
        output, model, bos=bos, eos=eos, pad=None, stop_ids=stops, chat_template=chat_template,
        corpus={"published_with": source.name},
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 and a message on what the user can mend."""
    parser = argparse.ArgumentParser(prog="nanollama.export.import_tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="tiktoken file, tokenizer.json, or a folder with a tokenizer")
    parser.add_argument("--output", required=True, help="folder to make: a frozen tokenizer")
    parser.add_argument("--kind", default="", choices=["", *KINDS], help="of a tiktoken file")
    parser.add_argument("--bos", help="token that begins every text; default: as published")
    parser.add_argument("--eos", help="token that ends every text; default: as published")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja")
    options = parser.parse_args(arguments)
    try:
        template = options.chat_template.read_text(encoding="utf-8") if options.chat_template else None
        frozen = import_tokenizer(options.source, options.output, kind=options.kind, bos=options.bos, eos=options.eos,
                                  chat_template=template)  # fmt: skip
    except (DataError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {frozen.vocab_size:,} ids, SHA-256 {frozen.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
