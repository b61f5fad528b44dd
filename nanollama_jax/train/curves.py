"""`curves.png`: loss, validation and learning rate against the global step."""

import pathlib
from typing import Any

from nanollama_jax.files import whole_file


def plot(stages: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Writes a PNG. `stages` maps each stage, in order, to the rows of its metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axis, validation_axis, lr_axis) = plt.subplots(
        3, 1, figsize=(9, 9), sharex=True, height_ratios=(3, 3, 1.5), layout="constrained"
    )
    for i, (name, rows) in enumerate(stages.items()):
        steps = [row for row in rows if "loss" in row]
        x = [row["step"] for row in steps]
        losses, rates = [row["loss"] for row in steps], [row["lr"] for row in steps]
        loss_axis.plot(x, losses, lw=0.8, color=f"C{i}", label=name)
        lr_axis.plot(x, rates, lw=1.2, color=f"C{i}")
    all_rows = [row for rows in stages.values() for row in rows]
    for i, (name, points) in enumerate(validation_curves(all_rows).items()):
        style = dict(label=name, color=f"C{i}")
        if name == "all":
            style = dict(label="this stage's mix", color="black", ls="--")
        validation_axis.plot(*zip(*points, strict=True), marker=".", lw=1, **style)
    if any("validation" in row for row in all_rows):
        loss_axis.set(ylabel="training loss (nats/pair)")
        validation_axis.set(ylabel="validation: share of pairs", ylim=(0, 1.02))
    else:
        loss_axis.set(ylabel="training loss (nats/token)")
        validation_axis.set(ylabel="validation perplexity", yscale="log")
    lr_axis.set(ylabel="learning rate", xlabel="step")
    for axis in (loss_axis, validation_axis, lr_axis):
        axis.grid(alpha=0.3)
    for axis in (loss_axis, validation_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    with whole_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def validation_curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """source -> (step, perplexity, or accuracy on preference pairs)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        measured = row.get("validation_perplexity") or {
            name: found["accuracy"] for name, found in row.get("validation", {}).items()
        }
        for name, value in measured.items():
            curves.setdefault(name, []).append((row["step"], value))
    return curves
