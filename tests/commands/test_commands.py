"""The `nanollama` command and the scripts in tools/; what each command does is tested elsewhere."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from nanollama_jax import commands
from nanollama_jax.command_line import named_urls
from nanollama_jax.errors import BadInput
from tests.conftest import ROOT

NAMES = [name for group in commands.GROUPS.values() for name in group]
MODULES = {name: name.replace("-", "_") for name in NAMES}


def nanollama(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nanollama_jax", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_listed_and_has_a_script():
    folder = pathlib.Path(commands.__file__).parent
    assert sorted(MODULES.values()) == sorted(
        path.stem for path in folder.glob("*.py") if path.stem != "__init__"
    )
    for name in set(NAMES) - {"train"}:  # main.py trains
        script = (ROOT / "tools" / f"{MODULES[name]}.py").read_text()
        assert f'checkout.run("{name}")' in script


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_a_summary_and_examples_and_imports_no_other(name):
    tree = ast.parse((ROOT / "nanollama_jax" / "commands" / f"{MODULES[name]}.py").read_text())
    help_text = ast.get_docstring(tree)
    summary, examples = help_text.split("\n\n")[:2]
    assert "\n" not in summary and len(summary) <= 76 and summary.endswith(".")
    assert f"nanollama {name} " in examples
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not [module for module in imported if module.startswith("nanollama_jax.commands")]


def test_help_lists_the_commands_without_importing_them():
    script = (
        "import sys; from nanollama_jax import commands; sys.argv[1:] = ['--help']; "
        "commands.main(); sys.exit('jax' in sys.modules or 'absl' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    for name in NAMES:
        assert f"\n  {name} " in done.stdout
    assert "\n  nanollama train --config" in done.stdout


def test_a_command_that_does_not_exist():
    done = nanollama("export_hf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "did you mean export-hf?" in done.stderr


def test_a_package_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "nanollama_jax.export.gguf", raising=False)
    monkeypatch.delitem(sys.modules, "nanollama_jax.commands.export_gguf", raising=False)
    # Or `from nanollama_jax.export import gguf` finds what an earlier test imported
    monkeypatch.delattr("nanollama_jax.export.gguf", raising=False)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        commands.run("export-gguf", [])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: nanollama export-gguf needs gguf, which is")


def test_the_command_that_trains(tmp_path):
    """What main.py does: the flags, the recipe, and its mistakes in one line."""
    shown = nanollama("train", "--help").stdout
    assert "nanollama train --config" in shown and "--workdir" in shown
    done = nanollama("train", "--config", "configs/phase1.py:7b")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    recipe = f"{ROOT}/configs/phase1.py:nano"
    done = nanollama("train", "--config", recipe, "--config.data.dir=absent", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["phase1_nano"]


def test_a_script_runs_from_anywhere_without_installation(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "nanollama generate --checkpoint" in done.stdout, done


def test_named_urls():
    assert named_urls(["gsm8k=file://a=b"]) == {"gsm8k": "file://a=b"}
    for arguments, words in ((["gsm8k"], "write NAME=URL"), (["a=b", "a=c"], "given twice")):
        with pytest.raises(BadInput, match=words):
            named_urls(arguments)
