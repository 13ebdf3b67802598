# SPDX-License-Identifier: Apache-2.0
"""Reads Prometheus' text format as Prometheus' own client does, and prints its samples.

    read_prometheus.py FILE   a line a sample: its metric's type, its name, its labels in order of name, its value
"""

import sys

from prometheus_client.parser import text_string_to_metric_families

with open(sys.argv[1], encoding="utf-8", newline="") as file:
    for family in text_string_to_metric_families(file.read()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value!r}" for name, value in sorted(sample.labels.items()))
            print(family.type, sample.name, f"{{{labels}}}", repr(sample.value))
