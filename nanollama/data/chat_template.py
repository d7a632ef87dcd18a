"""Chat templates: a list of messages to the text that a model was trained on. Jinja, in a sandbox.

Published models carry their template as a Jinja program; it runs without access to anything but the messages.
Knows nothing of tokenizers: special tokens are written out, `Tokenizer.encode_markup` reads them.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from nanollama.data.files import DataError


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says; here it is only passed through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    bos_token: str = "",
    eos_token: str = "",
    **values: Any,
) -> str:
    """The text of a conversation: messages are {"role", "content", ...}.

    add_generation_prompt: end with the opening of the assistant's turn. Errors: DataError with what the template
    itself complains of (roles that do not alternate, ...), or where it is not a valid program.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            **values,
        )
    except jinja2.TemplateError as error:
        raise DataError(f"chat template: {error}. Change the conversation, or the template.") from error


@functools.lru_cache(maxsize=16)  # a template is compiled once, not once per conversation
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _complain
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _complain(message: str) -> None:
    raise jinja2.TemplateError(message)
