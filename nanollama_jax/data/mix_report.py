"""Shows a mix (data/mix.py): tables and sample rows on a terminal, and a picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanollama_jax.data.mix import MAX_EPOCHS, Mix, Rows, context_bins, repetition_warnings, tokens_on_disk
from nanollama_jax.data.pipeline import Batch
from nanollama_jax.tokenizer import Tokenizer

SAMPLE_PIECES, SAMPLE_CHARACTERS = 6, 120  # of a row shown as text; of a piece
PICTURE_ROWS = 32  # of all sources together
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


def report(mix: Mix, rows: Mapping[str, Rows], tokenizer: Tokenizer, console: Console) -> None:
    """Prints tables of the sources and of their rows, warnings, what decontamination removed, and a few rows as text."""
    title = f"{mix.name}: {quantity(mix.tokens)} tokens in {mix.tokens // mix.seq_len:,} rows of {mix.seq_len:,}"
    table = _table(title, "share", "documents", "tokens on disk", "tokens to read", "epochs")
    for name, source in mix.sources.items():
        documents = source.manifest["splits"]["train"]["documents"]
        counts = (f"{documents:,}", quantity(tokens_on_disk(source)), quantity(mix.tokens * mix.shares[name]))
        table.add_row(name, f"{mix.shares[name]:.1%}", *counts, f"{mix.epochs[name]:.2f}")
    console.print(table)
    for line in repetition_warnings(mix.epochs, mix.name):
        console.print(f"warning: {line}", style="yellow", soft_wrap=True)
    for name, source in mix.sources.items():
        console.print(f"{name}: {_decontamination(source.manifest.get('decontamination'))}", soft_wrap=True)

    title = f"Packed rows: documents merged beyond max_segments={mix.max_segments}, and cut by a row's end"
    table = _table(title, "rows", "learnt", "documents", "a row", "at most", "merged", "cut")
    for name, found in rows.items():
        mean, most = f"{found.documents_N.mean():.1f}", f"{found.documents_N.max():,}"
        cut = f"{found.cut / max(1, found.begun):.0%}"
        table.add_row(name, f"{len(found.pieces):,}", f"{found.learnt:.2%}", f"{found.begun:,}", mean, most, f"{found.merged:,}", cut)
    console.print(table)

    bins = [f"<= {length(end)}" for end in context_bins(mix.seq_len)]
    title = f"Longest piece of a document in a row, and tokens with >= {length(mix.seq_len // 2)} of it before them"
    table = _table(title, *bins, f"tokens {length(mix.seq_len // 2)}+")
    shares = {name: np.append(found.context_histogram(mix.seq_len), found.long_context(mix.seq_len)) for name, found in rows.items()}
    for name, row in (shares | {"the mix": sum(mix.shares[name] * shares[name] for name in shares)}).items():
        table.add_row(name, *(f"{share:.1%}" for share in row))
    console.print(table)
    for name, found in rows.items():
        for number, row in found.samples.items():
            console.print(f"{name}, row {number:,}: {len(row['tokens']):,} tokens, {len(found.pieces[number])} document(s)", style="bold")
            console.print(row_text(row, tokenizer))


def _table(title: str, *columns: str) -> Table:
    table = Table("source", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def quantity(tokens: float) -> str:
    return next((f"{tokens / unit:.2f}{letter}" for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if tokens >= unit), f"{tokens:.0f}")


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _decontamination(counts: Mapping[str, Any] | None) -> str:
    if counts is None:
        return "not decontaminated"
    found = ", ".join(f"{name} {b['items_found']:,} of {b['items']:,} items" for name, b in counts["benchmarks"].items() if b["items_found"])
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
        text.append(_shortened(ids, tokenizer), style).append("<EOS>" if ids[-1] == tokenizer.eos_id else "<cut>", f"{style} reverse")
        merged = start > 0 and row["segment_ids"][start - 1] == segment
        table.add_row(f"{segment}{' (merged)' if merged else ''}", f"{len(ids):,}", text)
    if len(starts) > SAMPLE_PIECES:
        table.add_row("", "", f"and {len(starts) - SAMPLE_PIECES} more")
    return table


def _shortened(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text, or its beginning and end; control characters, and what would reverse or hide text, are escaped."""
    head, tail = (
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in tokenizer.decode(part))
        for part in (ids[: 2 * SAMPLE_CHARACTERS], ids[-2 * SAMPLE_CHARACTERS :])
    )
    if len(ids) <= 2 * SAMPLE_CHARACTERS and len(head) <= SAMPLE_CHARACTERS:
        return head
    return f"{head[: SAMPLE_CHARACTERS * 2 // 3]} [...] {tail[-(SAMPLE_CHARACTERS // 3) :]}"


def plot(mix: Mix, rows: Mapping[str, Rows], path: str | os.PathLike) -> None:
    """A PNG: tokens to read against tokens on disk, documents per row, rows by longest piece, and some rows as bars of documents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 6))
    disk_axis, documents_axis, context_axis = upper.subplots(1, 3)
    _draw_epochs(disk_axis, mix)
    most = int(max(found.documents_N.max() for found in rows.values()))
    edges = np.arange(0, most + 1 + most // 40, 1 + most // 40) + 0.5
    bins, width = context_bins(mix.seq_len), 0.85 / (len(rows) + 1)
    mixed = np.zeros(len(bins))
    for i, (name, found) in enumerate(rows.items()):
        weights = np.full(len(found.pieces), 100 / len(found.pieces))
        documents_axis.hist(found.documents_N, edges, weights=weights, histtype="stepfilled", alpha=0.5, color=f"C{i}", label=name)
        shares = 100 * found.context_histogram(mix.seq_len)
        mixed += mix.shares[name] * shares
        label = f"{name}: {found.long_context(mix.seq_len):.0%} of tokens have >= {length(mix.seq_len // 2)} before them"
        context_axis.bar(np.arange(len(bins)) + i * width, shares, width, color=f"C{i}", label=label)
    bars = context_axis.bar(np.arange(len(bins)) + len(rows) * width, mixed, width, color="dimgrey", label="the mix")
    context_axis.bar_label(bars, fmt="%.0f", fontsize="small")
    documents_axis.xaxis.get_major_locator().set_params(integer=True)
    documents_axis.set(xlabel="documents in a row", ylabel="% of a source's rows", title=f"Documents per row (segments: at most {mix.max_segments})")
    context_axis.set(xlabel="longest piece of one document (tokens)", ylabel="% of a source's rows", title="Rows by longest piece")
    context_axis.set(ylim=(0, 125 + 10 * len(rows)), yticks=range(0, 101, 20))  # room for the legend
    context_axis.set_xticks(np.arange(len(bins)) + len(rows) * width / 2, [f"≤ {length(end)}" for end in bins])
    for axis in (documents_axis, context_axis):
        axis.legend(loc="upper right", fontsize="small")
    lower.suptitle("The first rows of each source, in order: a document keeps its colour", fontsize="medium")
    axes = lower.subplots(1, len(rows), sharex=True, squeeze=False)[0]
    for i, (name, found) in enumerate(rows.items()):
        _draw_rows(axes[i], found, PICTURE_ROWS // len(rows))
        axes[i].set_title(name, color=f"C{i}")
    title = f"{mix.name}: {quantity(mix.tokens)} tokens in {mix.tokens // mix.seq_len:,} rows of {mix.seq_len:,}"
    figure.suptitle(title, parse_math=False)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def _draw_epochs(axis: Any, mix: Mix) -> None:
    """Each source's tokens to read (a diamond) beside a bar from 1 to MAX_EPOCHS times its tokens on disk."""
    for i, (name, source) in enumerate(mix.sources.items()):
        disk, wanted, once = tokens_on_disk(source), mix.tokens * mix.shares[name], i == 0
        axis.plot((disk, MAX_EPOCHS * disk), (i, i), color="lightgrey", lw=14, solid_capstyle="butt", zorder=1)
        axis.plot(disk, i, "|", color="black", ms=20, mew=2, label="tokens on disk" if once else None)
        axis.plot(MAX_EPOCHS * disk, i, "|", color="red", ms=20, mew=2, label=f"{MAX_EPOCHS} epochs of them" if once else None)
        axis.plot(wanted, i, "D", color=f"C{i}", label="tokens to read" if once else None)
        colour = "red" if mix.epochs[name] > MAX_EPOCHS else "black"
        axis.annotate(f"{mix.epochs[name]:.2f} epochs", (wanted, i), (0, 14), textcoords="offset points", ha="center", color=colour)
    axis.set(xscale="log", xlabel="tokens", title="To read, against on disk", yticks=range(len(mix.sources)), yticklabels=list(mix.sources))
    axis.set_ylim(len(mix.sources) - 0.4, -0.7)
    axis.margins(x=0.2)
    axis.legend(loc="lower center", ncols=3, fontsize="small", markerscale=0.5, handlelength=1)


def _draw_rows(axis: Any, rows: Rows, count: int) -> None:
    """The first rows from above; a document keeps its colour from row to row."""
    import matplotlib

    colours, document = matplotlib.colormaps["tab20"].colors, 0
    for number, (pieces, continued) in enumerate(zip(rows.pieces[:count], rows.continued)):
        first, document = document + (not continued), document + len(pieces) - continued
        ends = np.cumsum(pieces)
        fills = [colours[i % len(colours)] for i in range(first, first + len(pieces))]
        axis.barh(number, pieces, left=ends - pieces, height=0.8, color=fills, edgecolor="white", linewidth=0.4)
    axis.set(xlabel="token of the row", ylabel="row", xlim=(0, pieces.sum()), ylim=(min(count, len(rows.pieces)) - 0.5, -0.5))
