"""The package as declared: dependencies, locks, layers that import-linter cannot say, the set-up scripts."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nanollama.parallel.backend import REFUSED_JAXLIB

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(t) for t in texts] for name, texts in PROJECT["optional-dependencies"].items()}
OWN = ("nanollama", "data_pipeline", "evals")
# where a distribution's name is not its module's
DISTRIBUTION = {"yaml": "pyyaml", "kenlm": "ufal-kenlm", "sklearn": "scikit-learn", "fasttext": "fasttext-predict",
                "orbax": "orbax-checkpoint", "jaxlib": "jax", "PIL": "pillow"}

STACK = {"clu", "einops"}  # named as part of the stack: there for configs and code of users, whether we import them

# These rooms can be measured on a machine that has only the array libraries.
PURE_ROOMS = (
    "ops", "kernels", "models", "parallel", "config", "model_config", "quantities", "data.strict", "data.files",
    "training.step", "training.state", "training.optim", "training.schedules", "objectives.next_token",
)  # fmt: skip
ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "numpy", "einops", "nanollama"}


def needed(extra):
    """All that the extra asks for, with what it asks for by way of other extras of this project."""
    own = [name for requirement in EXTRAS[extra] if requirement.name == "nanollama" for name in requirement.extras]
    rest = [requirement for requirement in EXTRAS[extra] if requirement.name != "nanollama"]
    return rest + [requirement for name in own for requirement in needed(name)]


def sources(*tops):
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source):
    """Full names of all that `source` imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def third_party(source):
    tops = {name.partition(".")[0] for name in imports(source)}
    return tops - set(sys.stdlib_module_names) - set(OWN)


def check_no_nnx(source, where):
    assert not re.search(r"\bnnx\b", " ".join(imports(source))), f"{where} imports flax.nnx: use flax.linen"


def check_pure(source, where):
    extra = third_party(source) - ARRAY_LIBRARIES
    assert not extra, f"{where} imports {extra}: this room knows only the array libraries"


def test_every_import_is_declared_and_every_dependency_used():
    used = {
        canonicalize_name(DISTRIBUTION.get(name, name))
        for path in sources(*OWN)
        for name in third_party(path.read_text())
    }
    core = {canonicalize_name(requirement.name) for requirement in CORE}
    extras = ("curate", "data", "ray", "warc", "wandb", "hub-tokenizers", "gguf", "parity")
    optional = {canonicalize_name(r.name) for name in extras for r in EXTRAS[name]}
    assert not used - core - optional, "imported, but not in pyproject.toml"
    in_configs = {DISTRIBUTION.get(n, n) for p in sources("configs") for n in third_party(p.read_text())}
    unused = core - used - {canonicalize_name(name) for name in in_configs}
    assert unused <= STACK, "in pyproject.toml, but not imported"


def test_no_nnx():
    for path in sources(*OWN, "tests", "configs"):
        check_no_nnx(path.read_text(), path)
    for mutant in (
        "from flax import nnx",
        "import flax.nnx as nn",
        "def f():\n    from flax.nnx import Module",
    ):
        with pytest.raises(AssertionError):
            check_no_nnx(mutant, "mutant")


def test_pure_rooms_import_array_libraries_only():
    pure = [
        path
        for path in sources("nanollama")
        if any(f"{module_name(path)}.".startswith(f"nanollama.{room}.") for room in PURE_ROOMS)
    ]
    assert len(pure) >= 10
    for path in pure:
        check_pure(path.read_text(), path)
        within = {n for n in imports(path.read_text()) if n.startswith("nanollama.")}
        strangers = [n for n in within if not f"{n}.".startswith(tuple(f"nanollama.{r}." for r in PURE_ROOMS))]
        assert not strangers, f"{path} reaches {strangers}, which may import anything"
    with pytest.raises(AssertionError):
        check_pure("def f():\n    import ml_collections", "mutant")


def test_files_stay_small():
    long = {str(p): n for p in sources(*OWN) if (n := len(p.read_text().splitlines())) > 400}
    assert not long, "split these: a file owns one thing"


def test_refused_jaxlibs_cannot_be_installed():
    (jax,) = [requirement for requirement in CORE if requirement.name == "jax"]
    for version in REFUSED_JAXLIB:
        assert not jax.specifier.contains(version)
    assert jax.specifier.contains("0.10.1")


@pytest.mark.parametrize("lock", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_lock_files_hold_plain_versions_that_fit(lock):
    lines = lock.read_text().split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+", line), f"{line!r} is not name==version"
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in CORE + needed("test") + (EXTRAS["lint"] if lock.name == "py311.txt" else []):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the locked {version}"
    assert locked["jax"] == locked["jaxlib"]
    assert locked["jaxlib"] not in REFUSED_JAXLIB


@pytest.mark.parametrize("script", [".ci/run", "launch/install.sh"])
def test_scripts_are_executable_and_parse(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def install(python, venv):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "install.sh"), str(venv), ""],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_unusable_python_is_explained(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    ran = install(str(old), tmp_path / "venv")
    assert ran.returncode == 1
    assert "no usable Python >= 3.11" in ran.stderr
    assert not (tmp_path / "venv").exists()


def test_lock_file_is_chosen_by_python_version():
    """What install.sh names is there for each Python that CI runs."""
    assert "requirements/py$(" in (ROOT / "launch" / "install.sh").read_text()
    assert {path.name for path in (ROOT / "requirements").iterdir()} >= {"py311.txt", "py312.txt"}


@pytest.mark.parametrize("target", ["help", "quickstart", "test", "test-core", "lint", "clean"])
def test_make_targets_can_be_planned(target):
    ran = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
