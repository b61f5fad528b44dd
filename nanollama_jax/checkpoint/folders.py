"""Where checkpoints lie: one folder each, `WORKDIR/checkpoints/step_N`."""

import json
import os
import pathlib

FOLDER = "checkpoints"
SAVED = "latest_checkpoint.json"  # in the workdir: the last step that was reported saved


def find(path: str | os.PathLike) -> tuple[pathlib.Path, int] | None:
    """`(workdir, step)` of the latest checkpoint in a workdir, or of `WORKDIR/checkpoints/step_N`
    itself; None if there is none.

    Unfinished checkpoints have other names. Their contents are not read, only whether they hold
    a checkpoint's items or are somebody's workdir.
    """
    path = pathlib.Path(path)
    absolute = pathlib.Path(os.path.abspath(path))
    if is_checkpoint(absolute):
        return absolute.parent.parent, step_of(absolute)
    steps = steps_in(path / FOLDER)
    return (path, steps[-1]) if steps else None


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether `folder` is a checkpoint of a run: `checkpoints/step_N` with a checkpoint's items."""
    return folder.parent.name == FOLDER and step_of(folder) is not None and _holds_items(folder)


def steps_in(directory: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a `checkpoints` folder, ascending.

    An empty `step_N` counts: it is a damaged checkpoint. One that holds other things does not: it
    is a workdir of that name.
    """
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(
        step_of(path) for path in folders if _holds_items(path) or not any(path.iterdir())
    )


def step_of(folder: pathlib.Path) -> int | None:
    number = folder.name.removeprefix("step_")
    return int(number) if folder.name.startswith("step_") and number.isdecimal() else None


def reported_saved(workdir: str | os.PathLike) -> int | None:
    """The last step that a run in `workdir` reported saved, even if the checkpoint no longer
    exists; None if it saved none. Earlier versions left no such record.
    """
    path = pathlib.Path(workdir) / SAVED
    return json.loads(path.read_text())["step"] if path.exists() else None


def _holds_items(folder: pathlib.Path) -> bool:
    return (folder / "metadata").exists() or (folder / "state").exists()
