"""Shows a mix (data/mix.py): tables and sample rows on a terminal, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from nanollama_jax.console import Table
from nanollama_jax.data.mix import (
    MAX_EPOCHS,
    Mix,
    Rows,
    context_bins,
    repetition_warnings,
    tokens_on_disk,
)
from nanollama_jax.data.pipeline import Batch
from nanollama_jax.files import whole_file
from nanollama_jax.tokenizer import Tokenizer

SAMPLE_PIECES, SAMPLE_CHARACTERS = 6, 120  # of a row shown as text; of a piece
PICTURE_ROWS = 32  # of all sources together, but at least one of each
ORDER = "from the beginning of each source's order, at this stage's row length"
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


def report(mix: Mix, rows: Mapping[str, Rows], tokenizer: Tokenizer, console: Console) -> None:
    """Prints tables of the sources and of their rows, warnings, what decontamination removed, and a few rows as text."""
    cells = []
    for name, source in mix.sources.items():
        documents, share = source.manifest["splits"]["train"]["documents"], mix.shares[name]
        tokens = quantity(tokens_on_disk(source)), quantity(mix.tokens * share)
        cells.append((name, f"{share:.1%}", f"{documents:,}", *tokens, f"{mix.epochs[name]:.2f}"))
    title = f"{mix.name}: {quantity(mix.tokens)} tokens in {mix.tokens // mix.seq_len:,} rows of {mix.seq_len:,}"
    _print_table(
        console,
        title,
        ("share", "documents", "tokens\non disk", "tokens\nto read", "epochs"),
        cells,
    )
    for line in repetition_warnings(mix.epochs, mix.name):
        console.print(f"warning: {line}", style="yellow", soft_wrap=True)
    for name, source in mix.sources.items():
        console.print(
            f"{name}: {_decontamination(source.manifest.get('decontamination'))}", soft_wrap=True
        )

    cells = []
    for name, found in rows.items():
        documents = (
            f"{found.started:,}",
            f"{found.documents_N.mean():.1f}",
            f"{found.documents_N.max():,}",
            f"{found.merged:,}",
        )
        cells.append(
            (
                name,
                f"{len(found.pieces):,}",
                f"{found.learned:.2%}",
                *documents,
                f"{found.cut / max(1, found.started):.0%}",
            )
        )
    title = f"Packed rows: documents merged beyond max_segments={mix.max_segments}, and cut by a row's end"
    _print_table(
        console,
        title,
        ("rows", "learned", "documents", "a row", "at\nmost", "merged", "cut"),
        cells,
    )
    console.print(
        "fill: 100% of every row (a training stream has no padding); learned: all but EOS, whose next token is another document's"
    )

    half = length(mix.seq_len // 2)
    title = f"% of rows by the longest piece of a document in them, and % of tokens with >= {half} of it before them"
    columns = [*(f"<=\n{length(end)}" for end in context_bins(mix.seq_len)), f"tokens\n{half}+"]
    _print_table(
        console,
        title,
        columns,
        [(name, *(f"{share:.1f}" for share in row)) for name, row in _contexts(mix, rows).items()],
    )
    console.print(
        f"Sample rows, {ORDER}. In training, a stage goes on where the one before stopped:"
    )
    for name, found in rows.items():
        for number, row in found.samples.items():
            console.print(
                f"{name}, row {number:,}: {len(row['tokens']):,} tokens, {len(found.pieces[number])} document(s)",
                style="bold",
            )
            console.print(row_text(row, tokenizer))


def _contexts(mix: Mix, rows: Mapping[str, Rows]) -> dict[str, np.ndarray]:
    """Of each source and of the mix: % of rows in each of `context_bins`, then % of tokens with half a row before them."""
    found = {
        name: 100 * np.append(r.context_histogram(mix.seq_len), r.long_context(mix.seq_len))
        for name, r in rows.items()
    }
    return found | {"the mix": sum(mix.shares[name] * found[name] for name in rows)}


def _print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A source's name, then figures, which are never cut: in 60 columns names fold."""
    table = rich.table.Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("source", overflow="fold", min_width=5)
    for column, cells in zip(columns, list(zip(*rows))[1:]):
        table.add_column(
            column,
            justify="right",
            no_wrap=True,
            min_width=max(map(len, [*column.splitlines(), *cells])),
        )
    for row in rows:
        table.add_row(*row)
    console.print(table, crop=False)


def quantity(tokens: float) -> str:
    return next(
        (
            f"{tokens / unit:.2f}{letter}"
            for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K"))
            if tokens >= unit
        ),
        f"{tokens:.0f}",
    )


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _decontamination(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return "not decontaminated"
    found = ", ".join(
        f"{name} {b['items_found']:,} of {b['items']:,} items"
        for name, b in counts["benchmarks"].items()
        if b["items_found"]
    )
    removed = f"{counts['documents_dropped']:,} documents dropped, {counts['documents_cut']:,} cut by {counts['characters_removed']:,} characters"
    return f"decontaminated of {len(counts['benchmarks'])} benchmarks: {removed}; found: {found or 'none'}"


def row_text(row: Batch, tokenizer: Tokenizer) -> Table:
    """A line for each of a row's first pieces: segment, tokens, then BOS or `<cut>`, the text shortened, EOS or `<cut>`. A segment has one colour."""
    starts = sorted({0, *np.flatnonzero(row["tokens"] == tokenizer.bos_id).tolist()})
    table = Table("segment", "tokens", "", box=None, padding=(0, 1), header_style="dim")
    for start, end in list(zip(starts, [*starts[1:], len(row["tokens"])]))[:SAMPLE_PIECES]:
        ids, segment = row["tokens"][start:end].tolist(), int(row["segment_ids"][start])
        style = _COLOURS[segment % len(_COLOURS)]
        text = Text("<BOS>" if ids[0] == tokenizer.bos_id else "<cut>", overflow="fold", end="")
        text.stylize(f"{style} reverse")
        text.append(_shortened(ids, tokenizer), style).append(
            "<EOS>" if ids[-1] == tokenizer.eos_id else "<cut>", f"{style} reverse"
        )
        merged = start > 0 and row["segment_ids"][start - 1] == segment
        table.add_row(f"{segment}{' (merged)' if merged else ''}", f"{len(ids):,}", text)
    if len(starts) > SAMPLE_PIECES:
        table.add_row("", "", f"and {len(starts) - SAMPLE_PIECES} more")
    return table


def _shortened(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text, or its beginning and end; control characters, and what would reverse or hide text, are escaped."""
    head, tail = (
        "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode()
            for c in tokenizer.decode(part)
        )
        for part in (ids[: 2 * SAMPLE_CHARACTERS], ids[-2 * SAMPLE_CHARACTERS :])
    )
    if len(ids) <= 2 * SAMPLE_CHARACTERS and len(head) <= SAMPLE_CHARACTERS:
        return head
    return f"{head[: SAMPLE_CHARACTERS * 2 // 3]} [...] {tail[-(SAMPLE_CHARACTERS // 3) :]}"


def plot(mix: Mix, rows: Mapping[str, Rows], path: Path) -> None:
    """Writes `draw`'s figure as a PNG."""
    with whole_file(path) as file:
        draw(mix, rows).savefig(file, dpi=110, format="png")


def draw(mix: Mix, rows: Mapping[str, Rows]) -> Any:
    """A Matplotlib figure: tokens to read against tokens on disk, documents per row, rows by longest piece, and some rows as bars of documents."""
    import matplotlib.figure

    colours = (
        matplotlib.colormaps["tab10"].colors
        if len(rows) <= 10
        else matplotlib.colormaps["turbo"](np.linspace(0, 1, len(rows)))
    )
    lines, heights = (
        -(-len(rows) // 5),
        (max(4, 1 + 0.45 * len(rows)), max(6, 2 * -(-len(rows) // 5))),
    )  # in inches
    figure = matplotlib.figure.Figure(figsize=(16, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    disk_axis, documents_axis, context_axis = upper.subplots(1, 3)
    _draw_epochs(disk_axis, mix, colours)
    most = int(max(found.documents_N.max() for found in rows.values()))
    edges = np.arange(0, most + 1 + most // 40, 1 + most // 40) + 0.5
    bins, width = context_bins(mix.seq_len), 0.85 / (len(rows) + 1)
    for found, colour in zip(rows.values(), colours):
        weights = np.full(len(found.pieces), 100 / len(found.pieces))
        documents_axis.hist(
            found.documents_N,
            edges,
            weights=weights,
            histtype="stepfilled",
            alpha=0.5,
            color=colour,
        )
    handles = {}  # by hand: Matplotlib would drop names that begin with "_"
    for i, (colour, (name, (*shares, long))) in enumerate(
        zip((*colours[: len(rows)], "dimgrey"), _contexts(mix, rows).items())
    ):
        handles[f"{name}: {long:.0f}%"] = bars = context_axis.bar(
            np.arange(len(bins)) + i * width, shares, width, color=colour
        )
    context_axis.bar_label(bars, fmt="%.0f", fontsize="small")  # the mix's
    documents_axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    documents_axis.set(
        xlabel="documents in a row",
        ylabel="% of a source's rows",
        title=f"Documents per row (segments: at most {mix.max_segments})",
    )
    context_axis.set(
        xlabel="longest piece of one document (tokens)",
        ylabel="% of a source's rows",
        title="Rows by longest piece",
        ylim=(0, 108),
    )
    context_axis.set_xticks(
        np.arange(len(bins)) + len(rows) * width / 2, [f"≤ {length(end)}" for end in bins]
    )
    upper.legend(
        handles.values(),
        handles,
        loc="outside right upper",
        fontsize="small",
        title=f"tokens {length(mix.seq_len // 2)}+\ninto a document",
    )
    lower.suptitle(f"Rows {ORDER}: a document keeps its colour", fontsize="medium")
    for i, (name, found) in enumerate(rows.items()):
        axis = lower.add_subplot(lines, min(len(rows), 5), i + 1)
        _draw_rows(
            axis, found, max(1, PICTURE_ROWS // len(rows)), matplotlib.colormaps["tab20"].colors
        )
        axis.set_title(name, color=colours[i], parse_math=False)
    lower.supxlabel("token of the row (downwards: rows)", fontsize="medium")
    figure.suptitle(
        f"{mix.name}: {quantity(mix.tokens)} tokens in rows of {mix.seq_len:,}", parse_math=False
    )
    return figure


def _draw_epochs(axis: Any, mix: Mix, colours: Sequence) -> None:
    """Each source's tokens to read (a diamond) beside a bar from 1 to MAX_EPOCHS times its tokens on disk."""
    count, disk = (
        len(mix.sources),
        np.array([tokens_on_disk(source) for source in mix.sources.values()]),
    )
    wanted, labels = (
        [mix.tokens * mix.shares[name] for name in mix.sources],
        [f"{name}\n{mix.epochs[name]:.2f} epochs" for name in mix.sources],
    )
    axis.barh(range(count), (MAX_EPOCHS - 1) * disk, left=disk, height=0.4, color="lightgrey")
    once = axis.scatter(disk, range(count), 200, "black", marker="|", linewidths=2)
    most = axis.scatter(MAX_EPOCHS * disk, range(count), 200, "red", marker="|", linewidths=2)
    read = axis.scatter(wanted, range(count), 40, colours[:count], marker="D", zorder=3)
    axis.set_yticks(range(count), labels, parse_math=False)
    for label, name in zip(axis.get_yticklabels(), mix.sources):
        label.set_color("red" if mix.epochs[name] > MAX_EPOCHS else "black")
    ends = min(*disk, *wanted) / 1.5, max(*(MAX_EPOCHS * disk), *wanted) * 1.5
    bottom = count - 0.5 + min(1, 0.15 * count)  # room for the legend
    axis.set(
        xscale="log",
        xlabel="tokens",
        title="To read, against on disk",
        xlim=ends,
        ylim=(bottom, -0.5),
    )
    axis.xaxis.get_major_locator().set_params(subs=(1, 2, 5) if ends[1] < 100 * ends[0] else (1,))
    axis.xaxis.set_major_formatter(lambda tokens, _: quantity(tokens).replace(".00", ""))
    axis.xaxis.set_minor_formatter("")
    labels = ("on disk", f"{MAX_EPOCHS} epochs of it", "to read")
    axis.legend(
        (once, most, read),
        labels,
        loc="lower center",
        ncols=3,
        fontsize="small",
        markerscale=0.5,
        handlelength=1,
    )


def _draw_rows(axis: Any, rows: Rows, count: int, colours: Sequence) -> None:
    """The first rows from above; a document keeps its colour from row to row."""
    document, count = 0, min(count, len(rows.pieces))
    for number, (pieces, continued) in enumerate(zip(rows.pieces[:count], rows.continued)):
        first, document = document + (not continued), document + len(pieces) - continued
        ends = np.cumsum(pieces)
        fills = [colours[i % len(colours)] for i in range(first, first + len(pieces))]
        axis.barh(
            number,
            pieces,
            left=ends - pieces,
            height=0.8,
            color=fills,
            edgecolor="white",
            linewidth=0.4,
        )
    axis.set(
        xlim=(0, pieces.sum()), ylim=(count - 0.5, -0.5), yticks=range(0, count, 1 + count // 9)
    )
    axis.locator_params(axis="x", nbins=5)
