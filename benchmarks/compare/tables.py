# SPDX-License-Identifier: Apache-2.0
"""Tables out of the rounds' results."""

import collections
import csv
import statistics

from cells import Cell

# With fewer rounds a ratio says more about the moment than about the programs.
ROUNDS_FOR_RATIOS = 5
# Above this, others' use of the CPUs makes the figures doubtful.
QUIET_SHARE = 0.05


class Values:
    """What all rounds showed of one quantity, for each row and cell."""

    def __init__(self, data, quantity):
        self._values = collections.defaultdict(list)
        for trial in data["trials"]:
            value = quantity(trial["result"])
            if value is not None:
                self._values[trial["row"], trial["cell"]].append(value)

    def of(self, row, cell):
        return self._values.get((row, cell), [])

    def median(self, row, cell):
        values = self.of(row, cell)
        return statistics.median(values) if values else None


def throughput(result):
    return result["gigabytes_per_second"]


def latency(result):
    return result["latency_us"]["p50"]


def cpu_of(side):
    return lambda result: result[side]["cpu_seconds_per_gib"] if result[side] else None


def batches_of_several(data):
    return [cell for cell in data["cells"] if Cell.parse(cell).batch > 1]


def batches_of_one(data):
    return [cell for cell in data["cells"] if Cell.parse(cell).batch == 1]


def digits(value):
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def with_spread(values):
    if not values:
        return "-"
    return f"{digits(statistics.median(values))} ({digits(min(values))}–{digits(max(values))})"


def markdown(title, explanation, columns, lines):
    """A table; lines that have nothing to say are left out."""
    lines = [line for line in lines if any(cell != "-" for cell in line[1:])]
    if not lines or len(columns) < 2:
        return ""
    text = f"## {title}\n\n{explanation}\n\n"
    text += "| " + " | ".join(columns) + " |\n| --- |" + " ---: |" * (len(columns) - 1) + "\n"
    return text + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def spread_table(data, title, explanation, quantity, columns):
    values = Values(data, quantity)
    lines = [[row["name"]] + [with_spread(values.of(row["name"], cell)) for cell in columns] for row in data["rows"]]
    return markdown(title, explanation, ["", *columns], lines)


def cpu_table(data):
    sides = [Values(data, cpu_of(side)) for side in ("initiator", "target")]

    def text(row, cell):
        medians = [side.median(row, cell) for side in sides]
        return " + ".join(f"{median:.2f}" for median in medians if median is not None) or "-"

    lines = [[row["name"]] + [text(row["name"], cell) for cell in data["cells"]] for row in data["rows"]]
    return markdown("CPU time", "CPU-seconds a GiB, initiator + target; medians.", ["", *data["cells"]], lines)


def syscall_table(data):
    counted = {(run["row"], run["cell"]): run["result"] for run in data["syscalls"]}

    def text(row, cell):
        result = counted.get((row, cell))
        sides = [result[side]["syscalls_per_batch"] for side in ("initiator", "target") if result[side]] if result else []
        return " + ".join(f"{side:.1f}" for side in sides) or "-"

    lines = [[row["name"]] + [text(row["name"], cell) for cell in data["cells"]] for row in data["rows"]]
    explanation = "System calls a batch, initiator + target, counted in a run of their own that is in no other table."
    return markdown("System calls", explanation, ["", *data["cells"]], lines)


def compared_with(data, row):
    """What a row of kvferry is held against: others that do the same; sends are held against writes. Where it is told how
    to poll: only sockets, which say how far that goes. Sockets are those with the same congestion control."""
    operation = "read" if row["operation"] == "read" else "write"
    kinds = ("socket",) if "--poll" in row["command"] else ("socket", "peer", "memory")
    def is_cubic(either):
        return "cubic" in either["command"]

    return [
        other
        for other in data["rows"]
        if other["kind"] in kinds
        and other["operation"] == operation
        and (other["kind"] != "socket" or is_cubic(other) == is_cubic(row))
    ]


def better_quartile(values, best):
    """What a quarter of the rounds reached or bettered."""
    return statistics.quantiles(values, method="inclusive")[2 if best is max else 0]


def ratio(values, candidates, best):
    """Of the medians, and in brackets of the better quartiles; to the candidate that is best by either. "-" if any of them
    has too few rounds."""
    if not candidates or min(len(each) for each in (values, *candidates)) < ROUNDS_FOR_RATIOS:
        return "-"
    of_medians = statistics.median(values) / best(map(statistics.median, candidates))
    of_quartiles = better_quartile(values, best) / best(better_quartile(each, best) for each in candidates)
    return f"{of_medians:.2f} ({of_quartiles:.2f})"


def ratio_table(data, title, quantity, columns, best):
    values = Values(data, quantity)

    def against(row, others, cell):
        measured = [values.of(other["name"], cell) for other in others]
        return ratio(values.of(row["name"], cell), [each for each in measured if each], best)

    lines = []
    for row in (row for row in data["rows"] if row["kind"] == "kvferry"):
        others = compared_with(data, row)
        for kind, name in (("socket", "the best socket program"), ("peer", "the best peer")):
            group = [other for other in others if other["kind"] == kind]
            lines.append([f"**{row['name']} / {name}**"] + [against(row, group, cell) for cell in columns])
        for other in others:
            lines.append([f"{row['name']} / {other['name']}"] + [against(row, [other], cell) for cell in columns])
    explanation = (
        "Of the medians; in brackets: of the better quartiles, which a quarter of the rounds reached or bettered. "
        "The best one is chosen for each cell: by median, and in brackets by quartile."
    )
    return markdown(title, explanation, ["", *columns], lines)


def ratio_tables(data):
    if data["rounds"] < ROUNDS_FOR_RATIOS:
        return f"There are no ratios: they take at least {ROUNDS_FOR_RATIOS} rounds, not {data['rounds']}.\n\n"
    text = ratio_table(data, "Throughput, ratios", throughput, batches_of_several(data), max)
    return text + ratio_table(data, "Latency, ratios (less is better)", latency, batches_of_one(data), min)


def interference(data):
    shares = [trial["result"]["cpu_share_of_others"] for trial in data["trials"] + data.get("scale", [])]
    if not shares:
        return ""
    text = f"Other processes used {statistics.median(shares):.0%} of the CPUs during the median run, {max(shares):.0%} at most."
    if statistics.median(shares) > QUIET_SHARE:
        text += " **That is not quiet enough: the figures below are doubtful.**"
    return text + "\n\n"


MEDIANS = "Medians of the rounds, with the lowest and the highest."


def heading(data, title):
    machine = data["machine"]
    text = (
        f"# {title}\n\n{machine['cpus']} CPUs ({machine['cpu']}), Linux {machine['kernel']}, "
        f"{machine['congestion_control']} congestion control, {machine['started']}. Over loopback, {data['rounds']} rounds "
        f"of {data['seconds']} s for each figure, regions of {data['region']}. Columns: page size x pages in a batch.\n\n"
    )
    return text + interference(data)


def summary(data):
    text = heading(data, "Comparison")
    text += spread_table(data, "Throughput", f"GB/s. {MEDIANS}", throughput, data["cells"])
    if data["iperf3"]:
        text += f"`iperf3 -l 1M`: {with_spread(data['iperf3'])} GB/s.\n\n"
    text += spread_table(data, "Latency", f"Of a page, p50 in microseconds. {MEDIANS}", latency, batches_of_one(data))
    return text + ratio_tables(data) + cpu_table(data) + syscall_table(data)


def write_csv(data, path):
    """A line for each run."""
    columns = ["round", "row", "cell", "gigabytes_per_second", "p50_us", "p99_us", "p999_us"]
    columns += ["initiator_cpu_seconds_per_gib", "target_cpu_seconds_per_gib", "cpu_share_of_others"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for trial in data["trials"] + data.get("scale", []):
            result = trial["result"]
            latencies = [result["latency_us"][name] for name in ("p50", "p99", "p999")]
            cpu = [cpu_of(side)(result) for side in ("initiator", "target")]
            writer.writerow(
                [trial["round"], trial["row"], trial["cell"], throughput(result), *latencies, *cpu]
                + [result["cpu_share_of_others"]]
            )
