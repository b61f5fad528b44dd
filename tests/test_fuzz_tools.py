"""A sample of tests/fuzz_tools.py, which see; all of it takes an hour or two of a core."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.end_to_end.conftest import lab  # noqa: F401  a fixture
from tests.fuzz_tools import CALLS, OF_RECIPES, Outcome, cases

LINE = "error: it is wrong: do otherwise\n"
TRACEBACK = "Traceback (most recent call last):\nKeyError: 1\n"


def test_a_sample_of_all_tools(lab):  # noqa: F811
    command = [sys.executable, "-m", "tests.fuzz_tools", "--sample", "1", "--lab", str(lab.root)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" calls: ") == len(CALLS) + len(OF_RECIPES)


def test_every_tool_is_tried():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {
        "checkout"
    }  # only sets sys.path
    assert tools | {"main"} == {*CALLS, *OF_RECIPES}
    for tool, calls in (CALLS | OF_RECIPES).items():
        assert len(set(cases(tool, calls, ["--out"]))) >= 60


@pytest.mark.parametrize(
    ("status", "out", "err", "fault"),
    [
        (0, "done", "", None),
        (0, "", "[2 prompts]\n", None),
        (2, "", LINE, None),
        (3, "a table", LINE, None),
        (None, "", "", "hangs"),
        (1, "", TRACEBACK, "traceback"),
        (0, TRACEBACK, "", "traceback"),
        (2, "", TRACEBACK + LINE, "traceback"),
        (2, "", LINE + LINE, "not one line"),
        (2, "", f"warning\n{LINE}", "not one line"),
        (1, "", "", "not one line"),
        (1, "", "it is wrong\n", "not one line"),
        (-6, "", LINE, "status -6"),
        (139, "", LINE, "status 139"),
    ],
)
def test_what_is_a_fault(status, out, err, fault):
    assert Outcome(status, out, err, 0.1).fault("generate") == fault
