"""`python -m nanollama.chat --checkpoint=RUN`: talk with a chat model, or write with a base model.

Owns the dialogue: the text so far, the commands, and what Ctrl-C and Ctrl-D do. A base model knows no questions
and answers; it completes a text that you begin. A model whose tokenizer has a chat template answers what you say.
Works with a terminal and with piped input.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nanollama.data.chat_template import render
from nanollama.data.files import DataError
from nanollama.data.strict import FieldError, nearest
from nanollama.data.tokenizer import Tokenizer
from nanollama.generation import command_line
from nanollama.generation.engine import Engine, GenerationError
from nanollama.generation.loading import load_model
from nanollama.generation.sampling import SamplingConfig
from nanollama.generation.text import TextStream, printable
from nanollama.parallel import backend

HELP = """\
Type the beginning of a text and the model goes on. What you type next is added to that text, on a new line.
  (empty line)       the model goes on where it stopped
  a line ending in \\  goes on in the next line
  /reset             begin a new text
  /again             write the last part anew, with another seed
  /text              show the whole text so far
  /temperature X     0 = always the most likely token       /max N    tokens to write at one time
  /top-k N           only the N most likely tokens, 0 = all  /seed N   the same seed writes the same text
  /top-p X           only the likeliest tokens that together reach this probability
  /settings          show these values
  /quit              leave; so does Ctrl-D. Ctrl-C stops the model, not the program."""
_FIELDS = {"/temperature": "temperature", "/top-k": "top_k", "/top-p": "top_p", "/seed": "seed"}
_COMMANDS = (*_FIELDS, "/max", "/help", "/reset", "/again", "/text", "/settings", "/quit")


class Chat:
    """One text that a person and a model write together."""

    HELP = HELP
    _NOTES = {"stop": " [end of the text]", "stopped": " [stopped]"}

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        max_new_tokens: int,
        write: Callable[[str], Any],
        stopped: Callable[[], bool] = lambda: False,
    ):
        """write: takes pieces of output as they come. stopped: whether the person has asked the model to stop."""
        self._engine, self._tokenizer, self._write, self._stopped = engine, tokenizer, write, stopped
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.text = ""  # all of the document so far
        self._before = ""  # the text before the model's last part
        self._parts = 0  # written by the model, so that each has a seed of its own
        self._ended = False  # the model ended the document

    def handle(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line.split(maxsplit=1))
        line = line.removeprefix("/") if line.startswith("//") else line  # "//" begins a text with "/"
        if line:
            self._add(line)
        elif not self.text:
            self._write("Type the beginning of a text first; /help says more.\n")
            return True
        self._complete()
        return True

    def _add(self, line: str) -> None:
        if self._ended:
            self._reset()
        joint = "\n" if self.text and not self.text.endswith("\n") else ""
        self.text += joint + line

    def _reset(self) -> None:
        self.text, self._before, self._ended = "", "", False

    def _complete(self) -> None:
        """Let the model go on from the text, and show what it writes as it comes."""
        self._before, self._ended = self.text, False
        seed = (self.sampling.seed + self._parts) % (1 << 32)
        self._parts += 1
        prompt = self._prompt()
        if len(prompt) + self.max_new_tokens > self._engine.context_length:
            self._write(f"[the model sees the end of the text: its context is {self._engine.context_length} tokens]\n")
        stream = self._engine.stream(
            [prompt],
            dataclasses.replace(self.sampling, seed=seed),
            max_new_tokens=self.max_new_tokens,
            crop=True,
        )
        pieces, reason = TextStream(self._tokenizer), None
        for delta in stream:
            self._show(pieces.push(delta.tokens))
            reason = delta.finish_reason
            if self._stopped():
                stream.close()
                reason = reason or "stopped"
                break
        self._show(pieces.finish())
        self._write(self._NOTES.get(reason or "", "") + "\n")
        self._ended = reason == "stop"

    def _prompt(self) -> list[int]:
        return command_line.begin(self._tokenizer, self.text)

    def _show(self, new: str) -> None:
        self.text += new
        self._write(new)

    def _command(self, name: str, value: str = "") -> bool:
        """A line that begins with a slash."""
        if name in _FIELDS or name == "/max":
            self._write(self._set(name, value) + "\n")
        elif name == "/again" and self._before:
            self.text = self._before
            self._complete()
        elif name == "/again":
            self._write("Nothing is written yet.\n")
        elif name == "/reset":
            self._reset()
            self._write("A new text.\n")
        elif name in ("/help", "/text", "/settings"):
            self._write({"/help": self.HELP, "/text": self.text, "/settings": self.settings()}[name] + "\n")
        elif name != "/quit":
            close = nearest(name, _COMMANDS)
            self._write(f"No command {name}. {close} A text that begins with / is written with //.\n")
        return name != "/quit"

    def _set(self, name: str, value: str) -> str:
        """Change a setting; returns the settings, or what was wrong."""
        try:
            if name == "/max":
                if int(value) < 1:
                    raise ValueError
                self.max_new_tokens = int(value)
            else:
                field = _FIELDS[name]
                changed = dataclasses.replace(
                    self.sampling, **{field: type(getattr(self.sampling, field))(value)}
                )
                changed.check()
                self.sampling = changed
                self._parts = 0 if field == "seed" else self._parts
        except FieldError as error:
            return f"{name}: {error.problem}."
        except ValueError:
            return f"{name} {value}: not a number it can be. /help shows how it is written."
        return self.settings()

    def settings(self) -> str:
        """The values in use, as the commands that set them."""
        values = [f"{name} {getattr(self.sampling, field):g}" for name, field in _FIELDS.items()]
        return "  ".join([*values, f"/max {self.max_new_tokens}"])


class Conversation(Chat):
    """Turns of a person and a chat model, in the model's own template. `text` is what has been shown of them."""

    HELP = HELP[HELP.index("  /reset") :].replace("a new text", "anew").replace("last part", "last answer")
    _NOTES = {"stopped": " [stopped]", "length": " [cut off: /max has the limit]", "context": " [no room left]"}

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._messages: list[dict[str, str]] = []

    def handle(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        if not line:
            return True
        return super().handle(line)

    def _add(self, line: str) -> None:
        self.text += f"> {line}\n"
        self._messages.append({"role": "user", "content": line})

    def _reset(self) -> None:
        super()._reset()
        self._messages = []

    def _complete(self) -> None:
        if self._messages[-1]["role"] == "assistant":  # /again
            self._messages.pop()
        super()._complete()
        self._messages.append({"role": "assistant", "content": self.text[len(self._before) :]})
        self.text += "\n"

    def _prompt(self) -> list[int]:
        """The conversation in the template; words that only look like special tokens are taken out of messages."""
        tokenizer = self._tokenizer
        begin = tokenizer.piece(tokenizer.bos_id) if tokenizer.begin else ""
        filled = render(
            tokenizer.chat_template or "",
            [{**message, "content": tokenizer.without_special(message["content"])} for message in self._messages],
            add_generation_prompt=True,
            bos_token=begin,
            eos_token=tokenizer.piece(tokenizer.eos_id),
        )
        return tokenizer.encode_markup(filled)


class Interrupt:
    """Ctrl-C as a question that can be asked, while it is entered: `requested` since then?"""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.requested:  # a second one does not wait
            raise KeyboardInterrupt
        self.requested = True


def read_entry(chat: Chat, is_terminal: bool) -> str | None:
    """What the person types next, None at the end; a line ending in a backslash goes on in the next."""
    parts: list[str] = []
    while True:
        try:
            line = input("" if not is_terminal else ". " if parts else "+ " if chat.text else "> ")
        except EOFError:
            return "\n".join(parts) if parts else None
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 when the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m nanollama.chat", description=__doc__.split("\n")[0])
    command_line.add_arguments(parser)
    options = parser.parse_args(arguments)
    is_terminal = sys.stdin.isatty()
    command_line.forgive_encoding(sys.stdin, sys.stdout)
    try:
        sampling = command_line.sampling(options)
        backend.start()
        model = load_model(options.checkpoint, options.tokenizer)
        engine = command_line.engine(model)
    except command_line.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        kind = "it answers" if model.tokenizer.chat_template else "a base model, it goes on from what you type"
        print(f"{model.config.name}, step {model.step}: {kind}. /help says more.")

    def write(text: str) -> None:
        print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    interrupt = Interrupt()
    chat = (Conversation if model.tokenizer.chat_template else Chat)(
        engine, model.tokenizer, sampling, options.max_new_tokens, write, lambda: interrupt.requested
    )
    going = True
    while going:
        try:
            entry = read_entry(chat, is_terminal)
            if entry is None:
                break
            with interrupt:
                going = chat.handle(entry)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
        except (GenerationError, DataError) as error:
            print(f"error: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
