# SPDX-License-Identifier: Apache-2.0
"""Runs all programs over all cells in interleaved rounds; see compare.sh."""

import argparse
import fnmatch
import json
import os
import pathlib
import platform
import random
import resource
import socket
import subprocess
import sys
import time

import cells
import plots
import scale
import security
import tables

# What a program is given to end once it should have; its own time-out comes first.
GRACE_SECONDS = 60


def parse_arguments():
    names = [row.name for row in cells.rows() + security.rows()]
    parser = argparse.ArgumentParser(
        prog="compare.sh",
        description="Measures kvferry beside plain sockets, memcpy, iperf3 and other libraries over loopback, in "
        "interleaved rounds, and writes results.json, results.csv, summary.md and plots.",
        epilog="Rows: " + "; ".join(names),
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often all is measured (default 15); ratios take five")
    parser.add_argument("--seconds", type=float, default=0.15, help="of each measurement (default 0.15)")
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="PAGExBATCH",
        help=f"page and batch sizes (default: {' '.join(cells.THROUGHPUT_CELLS + cells.LATENCY_CELLS)})",
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="which rows, as shell patterns (default: all)"
    )
    parser.add_argument(
        "--poll",
        nargs="+",
        choices=cells.POLL_PROFILES,
        default=["never", "always"],
        help="the polling profiles that kvferry's writes are measured with besides the default (default: %(default)s)",
    )
    parser.add_argument("--region", default="64M", help="memory on each side (default 64M)")
    parser.add_argument("--security", action="store_true",
                        help="what checksums and encryption cost, beside openssl speed and memcpy, and nothing else")  # fmt: skip
    parser.add_argument("--scale", action=argparse.BooleanOptionalAction,
                        help="batches of 100,000 pages, and many peers (default: unless cells or rows are chosen)")  # fmt: skip
    parser.add_argument("--no-iperf", action="store_true", help="leave iperf3 out")
    parser.add_argument("--no-syscalls", action="store_true", help="do not count system calls, which takes runs of its own")
    parser.add_argument("--results", type=pathlib.Path, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--from-json", type=pathlib.Path, help="measure nothing: make the tables and plots of this results.json")
    parser.add_argument("--programs-in", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scale is None:
        arguments.scale = arguments.cells is None and arguments.rows is None and not arguments.security
    all_cells = security.CELLS if arguments.security else cells.THROUGHPUT_CELLS + cells.LATENCY_CELLS
    arguments.cells = arguments.cells or all_cells
    arguments.rows = arguments.rows or ["*"]
    try:
        arguments.cells = [cells.Cell.parse(cell) for cell in arguments.cells]
    except ValueError as error:
        parser.error(str(error))
    if arguments.rounds < 1:
        parser.error("--rounds: at least one")
    return arguments


def chosen_rows(arguments):
    """Those that were asked for and built."""
    result = []
    for row in security.rows() if arguments.security else cells.rows():
        profile = row.name.rpartition("poll ")[2] if ", poll " in row.name else None
        if profile is not None and profile not in arguments.poll:
            continue
        if not any(fnmatch.fnmatch(row.name, pattern) for pattern in arguments.rows):
            continue
        if not (arguments.programs_in / row.command[0]).exists():
            print(f"{row.name}: {row.command[0]} was not built, its library is not installed", file=sys.stderr)
            continue
        result.append(row)
    if not result:
        sys.exit("no row is left: see --rows")
    return result


def busy_seconds():
    """CPU time that all processes of the machine have used, and this one's children."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(value) for value in file.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everyone, children.ru_utime + children.ru_stime


def measure(arguments, row, cell, *options):
    """One run of one program. Returns its result, with how much of the CPUs others used meanwhile."""
    command = [str(arguments.programs_in / row.command[0]), *row.command[1:]]
    command += ["--page", str(cell.page), "--batch", str(cell.batch), "--region", row.region or arguments.region, "--json", "-", *options]
    everyone, children = busy_seconds()
    begin = time.monotonic()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=arguments.seconds + 2 * GRACE_SECONDS
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    elapsed = time.monotonic() - begin
    everyone, children = (after - before for after, before in zip(busy_seconds(), (everyone, children)))
    result = json.loads(done.stdout)[0]
    result["cpu_share_of_others"] = max(0.0, everyone - children) / (elapsed * cpu_count())
    return result


def cpu_count():
    with open("/proc/stat", encoding="ascii") as file:
        return sum(line.startswith("cpu") for line in file) - 1


def measure_iperf():
    """Gigabytes a second that `iperf3 -l 1M` receives in a second."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server_command = ["iperf3", "--server", "--one-off", "--bind", "127.0.0.1", "--port", port, "--forceflush"]
    client_command = ["iperf3", "--client", "127.0.0.1", "--port", port, "--length", "1M", "--time", "1", "--json"]
    with subprocess.Popen(server_command, stdout=subprocess.PIPE, text=True) as server:
        try:
            while "Server listening" not in (line := server.stdout.readline()):
                if not line:
                    raise RuntimeError("iperf3 does not listen")
            done = subprocess.run(client_command, capture_output=True, text=True, timeout=GRACE_SECONDS, check=True)
            server.communicate(timeout=GRACE_SECONDS)
        finally:
            server.kill()
    return json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 8e9


def describe_machine():
    model = "unknown"
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    congestion = pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "cpu": model,
        "cpus": cpu_count(),
        "kernel": platform.release(),
        "congestion_control": congestion.read_text(encoding="ascii").strip(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


class Failures:
    """Runs that failed: said at once, and again by the exit code."""

    def __init__(self):
        self.count = 0

    def add(self, error):
        self.count += 1
        print(f"\nFAILED: {error}", file=sys.stderr)


def rows_of(cell, rows):
    return [row for row in rows if cell.batch >= row.smallest_batch]


def run_rounds(arguments, rows, data, failures):
    """Each round measures everything once: cell by cell, so that what is compared is measured close together, and the rows of a
    cell in another order each time."""
    shuffle = random.Random(1)
    for number in range(arguments.rounds):
        for cell in arguments.cells:
            print(f"\rround {number + 1} of {arguments.rounds}: {cell}          ", end="", file=sys.stderr, flush=True)
            measured = rows_of(cell, rows)
            for row in shuffle.sample(measured, len(measured)):
                try:
                    result = measure(arguments, row, cell, "--seconds", str(arguments.seconds))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failures.add(error)
                    continue
                data["trials"].append({"round": number, "row": row.name, "cell": str(cell), "result": result})
        if arguments.scale:
            run_scale(arguments, number, data, failures)
        if arguments.security:
            add_measured(data["cipher"], "openssl", security.measure_cipher, failures)
        elif not arguments.no_iperf:
            add_measured(data["iperf3"], "iperf3", measure_iperf, failures)
    print(file=sys.stderr)


def add_measured(values, name, measure_it, failures):
    try:
        values.append(measure_it())
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        failures.add(f"{name}: {error}")


def run_scale(arguments, number, data, failures):
    for case in scale.CASES:
        print(f"\rround {number + 1} of {arguments.rounds}: {case.row.name}          ", end="", file=sys.stderr, flush=True)
        try:
            result = measure(arguments, case.row, case.cell, "--seconds", str(arguments.seconds))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            failures.add(error)
            continue
        data["scale"].append({"round": number, "row": case.row.name, "cell": str(case.cell), "result": result})


def count_syscalls(arguments, rows, data, failures):
    """Runs that nobody times, because counting slows system calls down."""
    if not pathlib.Path("/sys/kernel/tracing/events/raw_syscalls").exists():
        print("system calls are not counted: that takes root and a mounted /sys/kernel/tracing", file=sys.stderr)
        return
    for cell in arguments.cells:
        for row in rows_of(cell, rows):
            try:
                result = measure(arguments, row, cell, "--seconds", str(arguments.seconds), "--syscalls")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failures.add(error)
                continue
            data["syscalls"].append({"row": row.name, "cell": str(cell), "result": result})


def main():
    arguments = parse_arguments()
    arguments.results.mkdir(parents=True, exist_ok=True)
    failures = Failures()
    if arguments.from_json:
        data = json.loads(arguments.from_json.read_text(encoding="utf-8"))
    else:
        rows = chosen_rows(arguments)
        data = {
            "machine": describe_machine(),
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "region": arguments.region,
            "cells": [str(cell) for cell in arguments.cells],
            "rows": [{"name": row.name, "kind": row.kind, "operation": row.operation, "command": row.command} for row in rows],
            "trials": [],
            "scale": [],
            "syscalls": [],
            "iperf3": [],
            "cipher": [],
        }
        run_rounds(arguments, rows, data, failures)
        if not arguments.no_syscalls and not arguments.security:
            count_syscalls(arguments, rows, data, failures)
        (arguments.results / "results.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    tables.write_csv(data, arguments.results / "results.csv")
    if arguments.security:
        summary = security.summary(data)
    else:
        summary = tables.summary(data) + scale.summary(data)
        plots.draw(data, arguments.results)
    (arguments.results / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    print(f"Results, tables and plots are in {arguments.results}", file=sys.stderr)
    if failures.count:
        sys.exit(f"{failures.count} runs failed, see above")


if __name__ == "__main__":
    main()
