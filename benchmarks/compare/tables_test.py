# SPDX-License-Identifier: Apache-2.0
"""What the tables say, and what they refuse to say."""

import unittest

import scale
import security
import tables


def result(gigabytes_per_second, p50):
    side = {"cpu_seconds_per_gib": 0.25, "syscalls_per_batch": None}
    return {
        "gigabytes_per_second": gigabytes_per_second,
        "latency_us": {"p50": p50, "p99": p50, "p999": p50},
        "initiator": side,
        "target": side,
        "cpu_share_of_others": 0.0,
    }


ROWS = [
    {"name": "kvferry write", "kind": "kvferry", "operation": "write", "command": []},
    {"name": "socket one", "kind": "socket", "operation": "write", "command": []},
    {"name": "socket two", "kind": "socket", "operation": "write", "command": []},
    {"name": "socket read", "kind": "socket", "operation": "read", "command": []},
    {"name": "peer", "kind": "peer", "operation": "write", "command": []},
]


def data(rounds, failed_rounds_of_peer=0):
    """kvferry moves 3 GB/s (twice: 3.6), the sockets 2 and 4, the peer 1; latencies are the other way round."""
    speeds = {"kvferry write": 3, "socket one": 2, "socket two": 4, "socket read": 9, "peer": 1}
    trials = []
    for number in range(rounds):
        for row in ROWS:
            if row["name"] == "peer" and number < failed_rounds_of_peer:
                continue
            speed = 3.6 if row["name"] == "kvferry write" and number < 2 else speeds[row["name"]]
            for cell in ("64Kx16", "4Kx1"):
                trials.append({"round": number, "row": row["name"], "cell": cell, "result": result(speed, 60 / speed)})
    machine = {"cpus": 2, "cpu": "some", "kernel": "6", "congestion_control": "cubic", "started": "today"}
    return {
        "machine": machine,
        "rounds": rounds,
        "seconds": 0.4,
        "region": "128M",
        "cells": ["64Kx16", "4Kx1"],
        "rows": ROWS,
        "trials": trials,
        "syscalls": [],
        "iperf3": [],
        "cipher": [],
    }


class TablesTest(unittest.TestCase):
    def test_no_ratio_from_fewer_than_five_rounds(self):
        summary = tables.summary(data(4))
        self.assertIn("no ratios: they take at least 5 rounds, not 4", summary)
        self.assertNotIn(" / ", summary)

    def test_no_ratio_where_rounds_failed(self):
        summary = tables.summary(data(5, failed_rounds_of_peer=1))
        self.assertIn("| kvferry write / socket one | 1.50 (1.80) |", summary)
        self.assertNotIn("kvferry write / peer", summary)

    def test_ratios_of_medians_and_of_better_quartiles(self):
        summary = tables.summary(data(5))
        self.assertIn("| **kvferry write / the best socket program** | 0.75 (0.90) |", summary)
        self.assertIn("| kvferry write / peer | 3.00 (3.60) |", summary)
        self.assertNotIn("socket read |", summary.partition("ratios")[2].partition("## CPU")[0])

    def test_latency_ratios_are_of_the_lowest(self):
        latencies = tables.summary(data(5)).partition("Latency, ratios")[2]
        self.assertIn("| **kvferry write / the best socket program** | 1.33 (1.11) |", latencies)

    def test_medians_have_their_spread(self):
        self.assertIn("| kvferry write | 3.00 (3.00–3.60) | 3.00 (3.00–3.60) |", tables.summary(data(5)))

    def test_many_peers_are_held_against_one(self):
        trials = [
            {"row": name, "result": {"gigabytes_per_second": speed, "slowest_peer_of_mean": 0.8, "submission_us": None}}
            for name, speed in (("1 peer", 4.0), ("16 peers", 3.0))
            for _ in range(5)
        ]
        text = scale.table({"scale": trials}, "Peers", "", scale.PEERS, "slowest", lambda result: result["slowest_peer_of_mean"])
        self.assertIn("| 1 peer | 4.00 (4.00–4.00) | - | 0.80 (0.80–0.80) |", text)
        self.assertIn("| 16 peers | 3.00 (3.00–3.00) | 0.75 (0.75) | 0.80 (0.80–0.80) |", text)
        self.assertNotIn("64 peers", text)

    def test_security_is_held_against_plain_and_against_the_cipher(self):
        speeds = {"plain write": 4.0, "checksums write": 3.0, "TLS write": 2.0, "memcpy": 8.0}
        secured = data(0)
        secured["rows"] = [{"name": name, "kind": "kvferry", "operation": "write", "command": []} for name in speeds]
        secured["cipher"] = [5.0] * 5
        secured["trials"] = [
            {"round": number, "row": name, "cell": "64Kx16", "result": result(speed, 1)}
            for number in range(5)
            for name, speed in speeds.items()
        ]
        for trial in secured["trials"]:
            if trial["row"] == "memcpy":
                trial["result"]["target"] = None
        text = security.summary(secured)
        self.assertIn("| checksums write / plain write, GB/s | 0.75 | - |", text)
        self.assertIn("| checksums write / plain write, CPU-seconds a GiB | 1.00 | - |", text)
        self.assertIn("| TLS write / aes-128-gcm, GB/s | 0.40 | - |", text)
        self.assertIn("one core: 5.00 (5.00–5.00) GB/s", text)
        self.assertNotIn("TLS read", text)

    def test_a_machine_that_is_not_quiet_is_named(self):
        noisy = data(5)
        for trial in noisy["trials"]:
            trial["result"]["cpu_share_of_others"] = 0.3
        self.assertIn("doubtful", tables.summary(noisy))
        self.assertNotIn("doubtful", tables.summary(data(5)))


if __name__ == "__main__":
    unittest.main()
