# SPDX-License-Identifier: Apache-2.0
"""What checksums and encryption cost: compare.sh --security."""

import statistics
import subprocess

import tables
from cells import Row

CELLS = "4Kx256 16Kx64 64Kx64 256Kx64 1Mx16".split()
WAYS = {"plain": (), "checksums": ("--checksums",), "TLS": ("--encrypt",), "TLS and checksums": ("--encrypt", "--checksums")}
CIPHER = "aes-128-gcm"
# A record of TLS's.
CIPHER_BYTES = 16384


def rows():
    result = [
        Row(f"{way} {operation}", ("transfer_bench", "--operation", operation, *options), "kvferry", operation)
        for operation in ("write", "read")
        for way, options in WAYS.items()
    ]
    return [*result, Row("memcpy", ("memcpy_bench",), "memory")]


def measure_cipher():
    """Gigabytes a second that one core encrypts, as `openssl speed` says."""
    command = ["openssl", "speed", "-mr", "-evp", CIPHER, "-bytes", str(CIPHER_BYTES), "-seconds", "1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    for line in done.stdout.splitlines():
        if line.startswith("+F:"):
            return float(line.rsplit(":", 1)[1]) / 1e9
    raise RuntimeError(f"openssl speed says nothing of {CIPHER}: {done.stdout}")


def cpu_of_both(result):
    sides = [result[side] for side in ("initiator", "target")]
    # memcpy has one.
    return sum(side["cpu_seconds_per_gib"] for side in sides) if all(sides) else None


def ratio_of_medians(one, other):
    if min(len(one), len(other)) < tables.ROUNDS_FOR_RATIOS:
        return "-"
    return f"{statistics.median(one) / statistics.median(other):.2f}"


def cost_table(data):
    speed, cpu = tables.Values(data, tables.throughput), tables.Values(data, cpu_of_both)
    lines = []
    for operation in ("write", "read"):
        plain = f"plain {operation}"
        for way in list(WAYS)[1:]:
            row = f"{way} {operation}"
            for name, values in (("GB/s", speed), ("CPU-seconds a GiB", cpu)):
                ratios = [ratio_of_medians(values.of(row, cell), values.of(plain, cell)) for cell in data["cells"]]
                lines.append([f"{row} / {plain}, {name}", *ratios])
        ratios = [ratio_of_medians(speed.of(f"TLS {operation}", cell), data["cipher"]) for cell in data["cells"]]
        lines.append([f"TLS {operation} / {CIPHER}, GB/s", *ratios])
    explanation = "Of the medians. CPU time is that of both sides together."
    return tables.markdown("What it costs", explanation, ["", *data["cells"]], lines)


def summary(data):
    text = tables.heading(data, "Checksums and encryption")
    text += tables.spread_table(data, "Throughput", f"GB/s. {tables.MEDIANS}", tables.throughput, data["cells"])
    if data["cipher"]:
        text += f"`openssl speed -evp {CIPHER} -bytes {CIPHER_BYTES}`, one core: {tables.with_spread(data['cipher'])} GB/s.\n\n"
    return text + tables.cpu_table(data) + cost_table(data)
