# SPDX-License-Identifier: Apache-2.0
"""Plots of throughput and latency by page size."""

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

import tables
from cells import Cell

LINES = {"kvferry": "-", "socket": "--", "peer": ":", "memory": "-."}


def by_size(columns):
    return sorted(columns, key=lambda cell: (Cell.parse(cell).page, Cell.parse(cell).batch))


def draw_one(data, quantity, columns, label, logarithmic, path):
    columns = by_size(columns)
    values = tables.Values(data, quantity)
    figure, axes = pyplot.subplots(figsize=(10, 6))
    colors = pyplot.get_cmap("tab20").colors
    for number, row in enumerate(data["rows"]):
        measured = [(place, values.of(row["name"], cell)) for place, cell in enumerate(columns)]
        measured = [(place, of_cell) for place, of_cell in measured if of_cell]
        if not measured:
            continue
        medians = [statistics.median(of_cell) for _, of_cell in measured]
        below = [median - min(of_cell) for median, (_, of_cell) in zip(medians, measured)]
        above = [max(of_cell) - median for median, (_, of_cell) in zip(medians, measured)]
        axes.errorbar(
            [place for place, _ in measured],
            medians,
            yerr=[below, above],
            label=row["name"],
            linestyle=LINES[row["kind"]],
            color=colors[number % len(colors)],
            linewidth=2.5 if row["kind"] == "kvferry" else 1.5,
            marker="o",
            markersize=4,
            capsize=3,
            elinewidth=0.7,
        )
    axes.set_xticks(range(len(columns)), [cell.replace("x", " x ") for cell in columns])
    axes.set_xlabel("page size x pages in a batch")
    axes.set_ylabel(label)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def draw(data, folder):
    """Writes throughput.{svg,png} and latency.{svg,png}; each only if there is something to show."""
    note = f"median of {data['rounds']} rounds, with lowest and highest"
    if tables.batches_of_several(data):
        columns = tables.batches_of_several(data)
        draw_one(data, tables.throughput, columns, f"GB/s ({note})", False, folder / "throughput.svg")
    if tables.batches_of_one(data):
        columns = tables.batches_of_one(data)
        draw_one(data, tables.latency, columns, f"p50 of a batch, µs ({note})", True, folder / "latency.svg")
