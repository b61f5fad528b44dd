"""Output is shown verbatim on every terminal, and nothing is cut."""

import ast
import io
import json
import logging
import os
import subprocess
import sys

import pytest

from nanollama_jax.commands import generate
from nanollama_jax.console import Console, Table, printable, track
from nanollama_jax.errors import BadInput, one_line_errors
from nanollama_jax.infer.batch import Completion
from nanollama_jax.infer.sampling import Sampling
from nanollama_jax.train import metrics
from tests.conftest import ROOT

AWKWARD = [
    "[bold]x[/bold]",
    "[/b]",
    ":x: :smile:",
    "C:\\dir\\",
    "\\\\",
    "\\[red]",
    "a\tb",
    "  spaces  ",
    "x " * 200,
    "日本 né",
    "\n\n",
    "",
]


def console(**options) -> Console:
    return Console(file=io.StringIO(), **options)


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize(
    "options", [{}, {"force_terminal": True, "width": 40, "color_system": None}]
)
def test_text_is_printed_as_it_is(text, options):
    to = console(**options)
    to.print(text)
    to.print(text, style="bold", end="")
    assert to.file.getvalue() == f"{text}\n{text}"


def test_control_characters_do_nothing_on_a_terminal_and_stay_in_a_file():
    text = "a\x1b[2J\x1b]0;title\x07\r\x08\x9b1m\x7f\tb\n"
    terminal, file = console(force_terminal=True, color_system=None), console()
    for to in terminal, file:
        to.print(text)
    assert terminal.file.getvalue() == "a\\x1b[2J\\x1b]0;title\\x07\\r\\x08\\x9b1m\\x7f\tb\n\n"
    assert file.file.getvalue() == text + "\n"
    assert printable("né 日本 \u200d \u00a0 \u200f") == "né 日本 \u200d \u00a0 \u200f", (
        "text in other scripts is not control"
    )


def table() -> Table:
    made = Table("right_or_wrong", "contaminated", "file", title="[t] :x:")
    made.add_column("characters", justify="right")
    made.add_row("12,345,678", "a b" * 30, "/very/long/path/[2024]/" + "x" * 100, "\x1b[2J1,234")
    return made


def test_a_table_is_as_wide_as_its_content_where_there_is_no_terminal():
    to = console()
    to.print(table())
    shown = to.file.getvalue()
    for cell in (
        "right_or_wrong",
        "contaminated",
        "12,345,678",
        "a b" * 30,
        "/very/long/path/[2024]/" + "x" * 100,
        "\\x1b[2J1,234",
        "[t] :x:",
    ):
        assert cell in shown
    assert "\x1b" not in shown and "…" not in shown


@pytest.mark.parametrize("width", [80, 40, 10])
def test_cells_fold_on_a_narrow_terminal(width):
    to = console(force_terminal=True, color_system=None, width=width)
    to.print(table())
    shown = to.file.getvalue()
    assert "…" not in shown and "contaminated" in shown and "12,345,678" in shown, (
        "short words and figures stay whole"
    )
    bordered = [line for line in shown.splitlines() if line.startswith("│")]
    columns = [line.strip("│").split("│") for line in bordered]
    folded = ["".join(part.strip() for part in column) for column in zip(*columns, strict=True)]
    assert (
        folded[2] == "/very/long/path/[2024]/" + "x" * 100
        and folded[1].replace(" ", "") == "ab" * 30
    )


def test_a_progress_bar_reads_no_markup():
    to = console(force_terminal=True, color_system=None, width=80)
    assert list(track(range(3), "[b] :x: \x1b[2J", on=to)) == [0, 1, 2]
    assert "[b] :x: \\x1b[2J" in to.file.getvalue()


def test_a_stream_cannot_obey_an_escape_that_comes_in_parts(monkeypatch):
    class Parts:
        def stream(self, prompt, sampling, **options):
            yield from ("\x1b", "[2J", "é", "\x1b]0;ti", "tle\x07", " [x] \\")
            return Completion("", [1] * 6, "length")

    shown = console(force_terminal=True, color_system=None)
    monkeypatch.setattr(generate, "console", shown)
    generate.show(Parts(), "p\x1b[1m", Sampling(), {})
    assert shown.file.getvalue() == "p\\x1b[1m\\x1b[2Jé\\x1b]0;title\\x07 [x] \\\n"


def test_only_one_module_prints():
    """Elsewhere a print, or a rich console, would bring back markup, cut tables and escapes."""
    for path in [*ROOT.glob("nanollama_jax/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = (
                called.id
                if isinstance(called, ast.Name)
                else f"rich.{called.attr}"
                if isinstance(called, ast.Attribute)
                else ""
            )
            own = path.name == "console.py"
            assert own or name not in ("print", "rich.Console", "rich.track"), (
                f"{path}:{node.lineno}: use nanollama_jax.console"
            )


LOGS = """
import pathlib, sys
from nanollama_jax.train import metrics
metrics.set_up_logging(pathlib.Path(sys.argv[1]), True)
metrics.log.warning("n\\u00e9 \\U0001f600 [b] :x: \\ud800")
print("\\u00e9")
"""


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_that_is_not_utf8(env, tmp_path):
    run = dict(cwd=ROOT, env=os.environ | env, capture_output=True, check=False)
    done = subprocess.run([sys.executable, "-c", LOGS, str(tmp_path)], **run)
    assert (
        done.returncode == 0
        and not done.stderr
        and b"n\\xe9 \\U0001f600 [b] :x: \\ud800\n\\xe9\n" in done.stdout
    ), done
    assert "né 😀 [b] :x: \\ud800\n" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "né"}]}))
    done = subprocess.run(
        [sys.executable, "tools/check_finetuning_data.py", f"file://{tmp_path}/chats.jsonl"], **run
    )
    assert done.returncode == 2 and not done.stderr and b"role 'n\\xe9'" in done.stdout, done


def test_a_command_line_that_is_not_utf8_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", "--prompt", "caf\udcc3"])
    with pytest.raises(SystemExit) as end, one_line_errors():
        pass
    assert end.value.code == 2 and "PYTHONUTF8=1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["tool", "--prompt", "café 日本 \U0001f600"])
    with one_line_errors():
        pass


def test_the_name_of_a_file_is_one_line(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        open("absent\nfile")  # noqa: SIM115
    assert capsys.readouterr().err.startswith("error: No such file or directory (absent file): ")
    with pytest.raises(SystemExit), one_line_errors():
        raise BadInput("a\n b \\ [x]\n")
    assert capsys.readouterr().err == "error: a b \\ [x]\n"


def test_the_log_shows_text_as_it_is(tmp_path, capsys):
    metrics.set_up_logging(tmp_path, True)
    metrics.log.info("%s", "[b] :x: \\")
    logging.getLogger("nanollama").error("[/b]")
    assert (
        "[b] :x: \\\n" in capsys.readouterr().out and "[/b]\n" in (tmp_path / "log.txt").read_text()
    )
