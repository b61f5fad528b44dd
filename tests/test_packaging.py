"""What is installed, what importing it loads, and which versions it asks for."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import nanollama_jax
from nanollama_jax import checkpoint
from nanollama_jax.errors import BadInput
from tests.conftest import ROOT
from tests.export.tiny import tiny

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [
    Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines
]


def pins() -> list[Requirement]:
    files = ("requirements.txt", "requirements-dev.txt", "requirements-cuda12.txt")
    lines = "\n".join((ROOT / name).read_text() for name in files).splitlines()
    return [
        Requirement(line.partition(" #")[0])
        for line in lines
        if line and not line.startswith(("#", "-r"))
    ]


def test_the_versions_that_are_tested_satisfy_the_project():
    """requirements*.txt pins what is tested; pyproject.toml has a lower bound for each."""
    bounds = {
        (found.name, *sorted(found.extras)): found.specifier
        for found in DECLARED
        if found.name != PROJECT["name"]
    }
    pinned = {(found.name, *sorted(found.extras)) for found in pins()}
    assert pinned == set(bounds), pinned ^ set(bounds)
    for found in pins():
        (pin,) = found.specifier
        assert pin.operator == "==", found
        assert bounds[found.name, *sorted(found.extras)].contains(pin.version), found


def test_extras_name_extras():
    for found in DECLARED:
        if found.name == PROJECT["name"]:
            assert found.extras <= set(EXTRAS), found


def run(code: str, *arguments: object, python: object = sys.executable, **options) -> str:
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, nanollama_jax; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(code, cwd=ROOT).split())
    assert not loaded & {"jax", "flax", "numpy", "absl", "rich", "ml_collections", "sentencepiece"}


def test_public_names():
    for name in nanollama_jax.__all__:
        assert callable(getattr(nanollama_jax, name)) and name in dir(nanollama_jax)
    assert nanollama_jax.load == nanollama_jax.Engine.from_checkpoint
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nanollama_jax.nothing


def test_train_is_a_function_and_a_package_whatever_was_imported_first(tmp_path):
    code = (
        "from nanollama_jax import train\nimport nanollama_jax.train.losses\n"
        "import nanollama_jax\nassert callable(train) and train is nanollama_jax.train"
    )
    run(code, cwd=ROOT)
    from configs import phase1

    config = phase1.get_config("nano")
    config.data.dir = str(tmp_path / "absent")
    config.tokenizer.path = str(tmp_path / "absent.model")
    with pytest.raises(BadInput, match=r"absent"):
        nanollama_jax.train(config, tmp_path / "run")


def test_bad_input_is_a_value_error():
    with pytest.raises(ValueError, match="nowhere"):
        nanollama_jax.load("nowhere")


GENERATE = """
import sys
from nanollama_jax import Sampling, load
(completion,) = load(sys.argv[1]).generate(["def area("], Sampling(seed=1), max_new_tokens=4)
assert 1 <= len(completion.tokens) <= 4
from nanollama_jax import checkpoint
from nanollama_jax.export import hf
hf.export(checkpoint.load(sys.argv[1]), sys.argv[2])
unwanted = {"datatrove", "grain", "optax", "transformers", "ray", "datasets", "ml_collections"}
print(sorted(unwanted & {name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.skipif(
    not os.environ.get("NANOLLAMA_TEST_INSTALL"),
    reason="takes minutes and a network: set NANOLLAMA_TEST_INSTALL=1",
)
def test_the_wheel_in_an_empty_environment(tmp_path, chat_tokenizer):
    """Built from a copy, since setuptools builds inside the tree; installed without extras."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "nanollama_jax", source / "nanollama_jax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = ["-m", "pip", "--disable-pip-version-check"]
    wheels = ["wheel", str(source), "--no-deps", "--quiet", "-w", str(tmp_path)]
    subprocess.run([sys.executable, *pip, *wheels], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, *pip, "install", "--quiet", str(wheel)], check=True)
    print(subprocess.run([python, *pip, "list"], capture_output=True, text=True, check=True).stdout)
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    size = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())
    print(f"{size / 1e6:,.0f} MB installed")

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = dict(cwd=tmp_path, env=environment)
    checkpoint.save_weights(tiny(chat_tokenizer), tmp_path / "run")
    generated = run(GENERATE, tmp_path / "run", tmp_path / "hf", python=python, **options)
    assert generated == "[]\n", generated
    for arguments in (
        ("--help",),
        ("generate", "--checkpoint", "run", "--prompt", "a", "--max_new_tokens", "3"),
        ("export-hf", "--checkpoint", "run", "--out", "hf2"),
    ):
        done = subprocess.run(
            [tmp_path / "venv/bin/nanollama", *arguments],
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stderr
