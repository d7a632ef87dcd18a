"""Every command in the README and the guides: it exists, takes these options, and its files are there.

A command is not run to its end here: `make quickstart` is, shrunk to seconds, by tests/test_quickstart.py.
Here its help is asked for, its options are looked up in it, and its configs and pipelines are resolved.
"""

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from data_pipeline.mixtures.load import load_mixture
from nanollama import config_files
from nanollama.stages import load_pipeline

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = ".venv/bin/python"


def commands(text):
    """The commands in the fenced bash blocks of a document, one a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def check_command(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        check_make(words)
    elif words[:2] == [PYTHON, "-m"]:
        check_module(words[2], words[3:])
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    else:
        raise AssertionError(f"no check knows {command!r}: use make, {PYTHON} -m or pip install, or teach it")


def check_make(words):
    ran = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


@functools.cache
def help_of(module):
    """What `python -m module --help` prints. In this process, so that JAX is imported only once."""
    printed, before, code = io.StringIO(), sys.argv, None
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        code = leave.code
    finally:
        sys.argv = before
    assert code in (0, None), f"{module} --help ends with {code}"
    return printed.getvalue()


def check_module(module, arguments):
    text, values = help_of(module), {}
    overrides = [word.removeprefix("--config.") for word in arguments if word.startswith("--config.")]
    for word in arguments:
        name, _, value = word.partition("=")
        if name.startswith("--") and not name.startswith("--config."):
            assert re.search(rf"{re.escape(name)}\b", text), f"{module} has no option {name}:\n{text}"
            values[name] = value
    for name in ("--config", "--pipeline"):
        if name in values:
            assert (ROOT / values[name].partition(":")[0]).is_file(), f"no file {values[name]}"
    for path in [values.get("--config", ""), *(word for word in arguments if not word.startswith("-"))]:
        if path.endswith(".yaml"):
            load_mixture(path)
    if "--config" in values and not values["--config"].endswith(".yaml"):
        config_files.load(values["--config"], overrides)
    if "--pipeline" in values:
        names = [stage.name for stage in load_pipeline(values["--pipeline"]).stages]
        assert {values.get("--force", names[0]), values.get("--from", names[0])} <= set(names)


def check_pip(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        own = re.fullmatch(r"\.\[(.*)\]", word)
        if own:
            assert set(own[1].split(",")) <= set(extras), f"no such extra: {own[1]}"
        elif not word.startswith("-"):
            Requirement(word)


ALL = sorted({command for path in DOCUMENTS for command in commands(path.read_text())})


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", ALL)
def test_documented_command_is_right(command):
    check_command(command)


def test_there_are_commands():
    assert len(ALL) >= 12
    assert "make quickstart" in " ".join(ALL)


@pytest.mark.parametrize(
    "wrong",
    [
        "make quickstrat",
        "python -m nanollama.run",
        f"{PYTHON} -m nanollama.run --pipeline=configs/pipelines/quickstart.py --wrkdir=x",
        f"{PYTHON} -m nanollama.run --pipeline=configs/pipelines/none.py --workdir=x",
        f"{PYTHON} -m nanollama.run --pipeline=configs/pipelines/quickstart.py --workdir=x --from=no-stage",
        f"{PYTHON} -m data_pipeline.corpus --config=configs/mixtures/none.yaml --output=x",
        f"{PYTHON} -m data_pipeline.mixture plan configs/mixtures/quickstart.yaml --otput=x",
        'pip install -e ".[dta]"',
        "curl example.org | sh",
    ],
)
def test_a_wrong_command_would_be_found(wrong):
    with pytest.raises(AssertionError):
        check_command(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_inside_the_project_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


def test_readme_fits_a_screen_and_names_the_rooms():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 80
    for room in ("nanollama/", "data_pipeline/", "evals/", "configs/", "docs/"):
        assert f"`{room}`" in text
