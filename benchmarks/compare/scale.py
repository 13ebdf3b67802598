# SPDX-License-Identifier: Apache-2.0
"""kvferry with much to do at once: batches of 100,000 pages, and many peers."""

import dataclasses

import tables
from cells import Cell, Row


@dataclasses.dataclass(frozen=True)
class Case:
    """A measurement, and which one it is compared with."""

    row: Row
    cell: Cell
    baseline: str  # the name of a row


def case(name, baseline, cell, *options, operation="write"):
    command = ("transfer_bench", "--operation", operation, "--async", *options)
    return Case(Row(name, command, "kvferry", operation, region="512M"), Cell.parse(cell), baseline)


# What follows a name, and the options it stands for.
CONGESTION_CONTROLS = {"": (), ", cubic": ("--congestion", "cubic")}
# Each peer has I/O threads of its own: those that poll may be in each other's way.
PEER_SETTINGS = CONGESTION_CONTROLS | {", poll never": ("--poll", "never")}

LONG_BATCHES = [
    case(f"{operation}, {pages} pages a batch{suffix}", f"{operation}, 256 pages a batch{suffix}", f"4Kx{pages}", *options,
         operation=operation)
    for suffix, options in CONGESTION_CONTROLS.items()
    for operation in ("write", "read")
    for pages in (256, 100_000)
]  # fmt: skip
PEERS = [
    case(f"{peers} peer{'s' if peers > 1 else ''}{suffix}", f"1 peer{suffix}", "64Kx64", "--peers", str(peers), *options)
    for suffix, options in PEER_SETTINGS.items()
    for peers in (1, 4, 16, 64)
]
CASES = LONG_BATCHES + PEERS


class Values:
    """What all rounds showed of one quantity of one case."""

    def __init__(self, data, quantity):
        self._values = {}
        for trial in data.get("scale", []):
            self._values.setdefault(trial["row"], []).append(quantity(trial["result"]))

    def of(self, name):
        return self._values.get(name, [])

    def ratio(self, name, baseline):
        values, others = self.of(name), self.of(baseline)
        if name == baseline:
            return "-"
        return tables.ratio(values, [others], max)


def table(data, title, explanation, cases, quantity_name, quantity):
    speed, other = Values(data, tables.throughput), Values(data, quantity)
    lines = [
        [case.row.name, tables.with_spread(speed.of(case.row.name)), speed.ratio(case.row.name, case.baseline),
         tables.with_spread(other.of(case.row.name))]
        for case in cases
    ]  # fmt: skip
    return tables.markdown(title, explanation, ["", "GB/s", "ratio", quantity_name], lines)


def summary(data):
    medians = "Medians of the rounds, with the lowest and the highest (of ratios: the better quartiles); asynchronous calls."
    text = table(data, "Long batches", f"Pages of 4 KiB. {medians} The ratio is to batches of 256.", LONG_BATCHES,
                 "the call that starts it, ms", lambda result: result["submission_us"]["p50"] / 1000)  # fmt: skip
    return text + table(data, "Many peers", f"Writes of 64 pages of 64 KiB to each peer at once. {medians} The ratio is to one peer.",
                        PEERS, "slowest peer, of the mean", lambda result: result["slowest_peer_of_mean"])  # fmt: skip
