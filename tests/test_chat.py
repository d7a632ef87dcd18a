"""Text from a checkpoint: `nanollama.generate` and `nanollama.chat`, as a person or a pipe uses them."""

import io
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from packed_sets import make_texts, make_tokenizer

from nanollama import chat as chat_program
from nanollama import generate as generate_program
from nanollama.chat import Chat
from nanollama.config import CheckpointConfig, ComputeConfig, as_dict, resolve
from nanollama.data.tokenizer import Tokenizer
from nanollama.data.tokenizer_folder import load_tokenizer
from nanollama.generation import command_line
from nanollama.generation.engine import Engine
from nanollama.generation.loading import load_model
from nanollama.generation.sampling import SamplingConfig
from nanollama.generation.text import TextStream, printable
from nanollama.models.decoder import Decoder, init_params
from nanollama.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
CONTEXT = 64


def make_run(folder: Path, context: int) -> Path:
    """A run folder with a checkpoint of random parameters; no training."""
    tokenizer = make_tokenizer(folder / "tokenizer", 400)
    config = resolve({
        "name": "tiny", "steps": 10, "batch": {"global_rows": 8},
        "model": {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4,
                  "num_kv_heads": 2, "head_dim": 8},
        "data": {"sets": [{"path": "absent"}], "tokenizer": "absent", "sequence_length": context},
    })  # fmt: skip
    generator = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(Decoder(config.model, ComputeConfig()), 0)))
    params = jax.tree.map(lambda leaf: 0.3 * generator.standard_normal(leaf.shape, np.float32), shapes)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    checkpoints.save(10, {"params": params}, {"config": as_dict(config), "tokenizer": tokenizer.sha256})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("chat") / "run", CONTEXT)


@pytest.fixture(scope="module")
def engine(run: Path) -> Engine:
    return command_line.engine(load_model(run))


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Tokenizer:
    return load_tokenizer(run / "tokenizer")


# --- text as it comes


def check_stream(make: Callable[[Tokenizer], TextStream], tokenizer: Tokenizer) -> None:
    """Cut anywhere, the pieces join to the whole text, and what was given out never changes."""
    choose = random.Random(0)
    letters = ["a", "é", "€", "😀", " ", "\n", "\u2581", "\ufffd", "the loader", "日本"]
    for trial in range(300):
        if trial % 2:
            ids = tokenizer.encode("".join(choose.choices(letters, k=10)))
        else:  # any ids at all, torn characters among them
            ids = [choose.randrange(tokenizer.vocab_size) for _ in range(choose.randrange(25))]
        whole, stream, text, at = tokenizer.decode(ids), make(tokenizer), "", 0
        while at < len(ids):
            step = choose.randrange(1, 4)
            text, at = text + stream.push(ids[at : at + step]), at + step
            assert whole.startswith(text)
        assert text + stream.finish() == whole


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    check_stream(TextStream, tokenizer)


def test_decoding_piece_by_piece_is_caught(tokenizer: Tokenizer) -> None:
    class Naive(TextStream):
        def push(self, tokens: list[int]) -> str:  # type: ignore[override]
            return self._tokenizer.decode(tokens)

        def finish(self) -> str:
            return ""

    with pytest.raises(AssertionError):
        check_stream(Naive, tokenizer)


def test_a_character_appears_when_it_is_whole(tokenizer: Tokenizer) -> None:
    stream, ids = TextStream(tokenizer), tokenizer.encode("a😀b")
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "😀", "b"]


def test_text_cannot_command_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\tc\nd\x7f") == "a\u241b[2Jb\u2407\tc\nd\u2421"


# --- generate


def generate(*arguments: str) -> int:
    return generate_program.main(list(arguments))


def test_generate_prints_and_writes_samples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--checkpoint={run}", "--max-new-tokens=9", "--seed=5", f"--output={tmp_path}"]
    assert generate(*arguments, "--prompt=the loader ", "--prompt", "a model", "") == 0
    written = json.loads((tmp_path / "samples.json").read_text())
    printed = capsys.readouterr().out
    assert [sample["prompt"] for sample in written["samples"]] == ["the loader ", "a model", ""]
    assert [sample["seed"] for sample in written["samples"]] == [5, 6, 7]
    for sample in written["samples"]:
        assert set(sample) == {"prompt", "text", "temperature", "top_p", "top_k", "seed", "tokens", "finish_reason"}
        assert sample["prompt"] + "\u2502" + sample["text"] in printed
        assert sample["finish_reason"] == "stop" or sample["tokens"] == 9
    assert written["checkpoint"]["step"] == 10 and str(run) not in json.dumps(written)
    assert json.loads(printed.splitlines()[-1])["samples"] == 3

    # one of them again, by its entry, from the step's folder
    one = written["samples"][1]
    again = [f"--checkpoint={run}/checkpoints/10", "--max-new-tokens=9", f"--seed={one['seed']}"]
    assert generate(*again, f"--prompt={one['prompt']}", f"--output={tmp_path / 'again'}") == 0
    assert json.loads((tmp_path / "again" / "samples.json").read_text())["samples"] == [one]


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\n  two\u2028three\n".encode())
    (tmp_path / "b.json").write_text('["one", {"prompt": "two\\n"}, ""]')
    assert generate_program.read_prompts(tmp_path / "a.txt") == ["one", "  two\u2028three"]
    assert generate_program.read_prompts(tmp_path / "b.json") == ["one", "two\n", ""]


LONG = "--prompt=" + " ".join(make_texts(20, seed=2))


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ([], None, "no prompt. Give --prompt"),
        (["--prompt=a", "--temperature=-1"], None, "sampling.temperature: -1.0 is not 0 (greedy) or more"),
        (["--prompt=a", "--max-new-tokens=0"], None, "max_new_tokens is 0"),
        (["--prompt=a", LONG], None, "prompt 1 has"),
        (["--prompt=\udcff"], None, "is not Unicode"),
        (["--prompts={file}.json"], None, "no such file"),
        (["--prompts={file}.json"], b'["a",\n', ".json:2: not JSON"),
        (["--prompts={file}.json"], b'{"prompt": "a"}', "is not a list"),
        (["--prompts={file}.json"], b'["a", 3]', "entry 1 is 3"),
        (["--prompts={file}.txt"], b"a\xff", "not UTF-8 at byte 1"),
        (["--prompts={file}.txt"], b"\n \n", "no prompt"),
    ],
)
def test_generate_refuses_with_a_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], content: bytes | None, message: str,
) -> None:  # fmt: skip
    arguments = [argument.format(file=tmp_path / "file") for argument in arguments]
    if content is not None:
        Path(arguments[-1].partition("=")[2]).write_bytes(content)
    assert generate(f"--checkpoint={run}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_long_prompt_can_be_cropped(run: Path) -> None:
    assert generate(f"--checkpoint={run}", LONG, "--crop", "--max-new-tokens=3") == 0


def test_absent_checkpoints_and_other_tokenizers_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", 380)
    for program in (generate_program, chat_program):
        prompt = ["--prompt=a"] if program is generate_program else []
        assert program.main([f"--checkpoint={tmp_path}", *prompt]) == 2
        assert "no good checkpoint there" in capsys.readouterr().err
        assert program.main([f"--checkpoint={run}", f"--tokenizer={other.directory}", *prompt]) == 2
        error = capsys.readouterr().err
        assert other.sha256 in error and load_tokenizer(run / "tokenizer").sha256 in error
        assert f"--tokenizer={run / 'tokenizer'}" in error, "the way to mend it"


# --- chat


class Screen:
    """What a chat wrote, and when the person has had enough."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, most: int = 10):
        self.pieces: list[str] = []
        self.patience = float("inf")  # pieces after which the person presses Ctrl-C
        config = SamplingConfig(temperature=0.8, top_p=0.95)
        self.chat = Chat(engine, tokenizer, config, most, self.pieces.append, self.enough)

    def enough(self) -> bool:
        return len(self.pieces) >= self.patience

    def type(self, line: str) -> str:
        before = len(self.pieces)
        assert self.chat.handle(line)
        return "".join(self.pieces[before:])


@pytest.fixture
def screen(engine: Engine, tokenizer: Tokenizer) -> Screen:
    return Screen(engine, tokenizer)


def test_chat_streams_what_the_engine_writes(screen: Screen, engine: Engine, tokenizer: Tokenizer) -> None:
    shown = screen.type("the loader")
    config = SamplingConfig(temperature=0.8, top_p=0.95)
    (done,) = engine.generate([command_line.begin(tokenizer, "the loader")], config, max_new_tokens=10)
    end = " [end of the text]\n" if done.finish_reason == "stop" else "\n"
    assert shown == tokenizer.decode(done.tokens) + end
    assert screen.chat.text == "the loader" + tokenizer.decode(done.tokens)
    assert len(screen.pieces) > 3, "not in one piece"


def test_chat_keeps_the_text_until_reset(screen: Screen) -> None:
    screen.type("the loader")
    first = screen.chat.text
    screen.type("and then")
    assert screen.chat.text.startswith(first.rstrip("\n") + "\nand then")
    longer = screen.chat.text
    screen.type("")
    assert screen.chat.text.startswith(longer) and len(screen.chat.text) > len(longer)
    assert screen.type("/text") == screen.chat.text + "\n"
    assert screen.type("/reset") == "A new text.\n" and screen.chat.text == ""
    assert "Type the beginning" in screen.type("")
    screen.type("//etc")
    assert screen.chat.text.startswith("/etc")


def test_the_same_seed_writes_the_same_text_and_again_writes_another(screen: Screen) -> None:
    screen.type("/seed 3")
    first = screen.type("a model")
    again = screen.type("/again")
    assert again != first and screen.chat.text.startswith("a model")
    screen.type("/reset")
    screen.type("/seed 3")
    assert screen.type("a model") == first


def test_a_text_longer_than_the_context_goes_on(screen: Screen) -> None:
    shown = screen.type(" ".join(make_texts(20, seed=2)))
    assert shown.startswith(f"[the model sees the end of the text: its context is {CONTEXT} tokens]\n")
    assert len(shown.splitlines()) > 1


def test_the_end_of_a_document_begins_a_new_text(
    screen: Screen, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "stop_ids", tuple(range(4, 400)))  # whatever comes first ends it
    assert screen.type("one").endswith(" [end of the text]\n")
    screen.type("two")
    assert screen.chat.text.startswith("two")


def test_ctrl_c_stops_the_model_and_keeps_its_text(engine: Engine, tokenizer: Tokenizer) -> None:
    screen = Screen(engine, tokenizer, most=40)
    screen.patience = 2
    shown = screen.type("the loader")
    assert shown.endswith(" [stopped]\n") and screen.chat.text == "the loader" + shown.removesuffix(" [stopped]\n")
    screen.patience = float("inf")
    assert screen.type("") != ""


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/temperature 0.5", "/temperature 0.5  /top-k 0"),
        ("/top-k 7", "/top-k 7"),
        ("/max 3", "/max 3"),
        ("/top-p 2", "/top-p: 2.0 is not above 0 and at most 1."),
        ("/temperature", "/temperature : not a number"),
        ("/top-k 1.5", "/top-k 1.5: not a number"),
        ("/max 0", "/max 0: not a number"),
        ("/temprature 1", "No command /temprature. Did you mean '/temperature'?"),
        ("/help", "Ctrl-C stops the model"),
        ("/settings", "/temperature 0.8  /top-k 0  /top-p 0.95  /seed 0  /max 10"),
        ("/again", "Nothing is written yet."),
    ],
)
def test_chat_commands(screen: Screen, line: str, answer: str) -> None:
    assert answer in screen.type(line)
    assert screen.chat.text == ""


def test_quit_leaves(screen: Screen) -> None:
    assert screen.chat.handle("/quit") is False


def test_piped_input_is_read_to_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"/max 4\nthe \\\nloader \xff\n/text\nlast \\"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    assert chat_program.main([f"--checkpoint={run}", "--temperature=0"]) == 0
    printed = capsys.readouterr()
    assert "> " not in printed.out and printed.err == ""
    assert "the \nloader \ufffd" in printed.out
    assert printed.out.startswith("/temperature 0  /top-k 0  /top-p 0.95  /seed 0  /max 4\n")


class Terminal:
    """`python -m nanollama.chat` on a pseudo terminal."""

    def __init__(self, *arguments: str):
        self._outside, inside = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
        environment["TERM"] = "dumb"  # no escape codes around what is typed
        command = [sys.executable, "-m", "nanollama.chat", *arguments]
        streams = {"stdin": inside, "stdout": inside, "stderr": inside}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        os.close(inside)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._outside, keys.encode())

    def wait_for(self, text: str, every: float = 120, again: Callable[[], object] | None = None) -> str:
        """What was shown before `text`, which is passed; `again` is called after each silence of `every` s."""
        end = time.monotonic() + 120
        while text not in self._seen:
            if select.select([self._outside], [], [], every)[0]:
                self._seen += os.read(self._outside, 4096).decode(errors="replace")
            else:
                assert again and time.monotonic() < end, f"waiting for {text!r}, shown: {self._seen!r}"
                again()
        before, _, self._seen = self._seen.partition(text)
        return before

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C, pressed again as a person would: `input` may not see one between its prompt and its first wait."""
        self.interrupt()
        self.wait_for(text, every=5, again=self.interrupt)

    def interrupt(self) -> None:
        """One Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait_for_more(self, characters: int) -> None:
        """Until that many characters more are shown."""
        while len(self._seen) < characters:
            assert select.select([self._outside], [], [], 120)[0], f"shown: {self._seen!r}"
            self._seen += os.read(self._outside, 4096).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._outside)


def test_a_terminal_with_ctrl_c_and_ctrl_d(tmp_path: Path) -> None:
    """Ctrl-C at the prompt, and while a long text is written; then Ctrl-D."""
    run = make_run(tmp_path / "run", 4096)
    terminal = Terminal(f"--checkpoint={run}", "--max-new-tokens=1000000", "--temperature=0")
    try:
        terminal.wait_for("step 10: a base model")
        terminal.wait_for("> ")
        terminal.interrupt_until("(Ctrl-D or /quit leaves)")
        terminal.type("the loader\n")
        terminal.wait_for("the loader\r\n")
        terminal.wait_for_more(40)  # the model is at it
        terminal.interrupt()
        terminal.wait_for("[stopped]")
        terminal.type("/settings\n")
        terminal.wait_for("/max 1000000")
        terminal.wait_for("+ ")  # a Ctrl-D typed before the program reads keys one by one would be lost
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
