# SPDX-License-Identifier: Apache-2.0
"""How long it takes from a prompt's end in one vLLM to the first token in another one, by connector. See
tests/engines.sh --times.

The prefilling instance's answer ends the prompt, the decoding one's first token is its answer of one token; both are
processes of this host. For prompts that are pushed the second may come before the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from free_ports import free_port
from tiny_model import make_model
from vllm_pair import Instance, instances, prompt_of

#: Keys and values of a token take 16 KiB.
SHAPE = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
LENGTHS = (128, 512, 1500)
ENGINE = {"num_gpu_blocks_override": 200, "max_model_len": 2048}


@dataclass
class Way:
    """A pair of instances, and what a router does between them."""

    name: str
    connector: dict[str, Any]
    pushed: bool = False
    #: Members of the connector's own configuration.
    prefill: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    #: Environments.
    environment: Callable[[], dict[str, str]] = dict


KVFERRY = {"kv_connector": "KvferryConnector", "kv_connector_module_path": "kvferry.vllm"}
NIXL = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}


def ways() -> list[Way]:
    def nixl(*transports: tuple[str, str]) -> Callable[[], dict[str, str]]:
        return lambda: {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), **dict(transports)}

    return [
        Way("kvferry, read over TCP", KVFERRY),
        Way("kvferry, pushed over TCP", KVFERRY, pushed=True, prefill={"port": free_port()}, both={"mode": "push"}),
        Way("kvferry, read within the host", KVFERRY, both={"transport": "auto"}),
        Way(
            "kvferry, pushed within the host", KVFERRY, pushed=True, prefill={"port": free_port()},
            both={"mode": "push", "transport": "auto"},
        ),
        Way("NIXL, over TCP", NIXL, environment=nixl(("UCX_TLS", "tcp"))),
        Way("NIXL, as UCX likes", NIXL, environment=nixl()),
    ]  # fmt: skip


def started(way: Way, model: Path, logs: Path, role: str, extra: dict[str, Any]) -> Instance:
    config = {
        **way.connector, "kv_role": role, "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {**way.both, **extra}
    }  # fmt: skip
    log = logs / f"{way.name}-{role}.log"
    return Instance(model, log, environment=way.environment(), kv_transfer_config=config, **ENGINE)


def handed_over(way: Way, prefill: Instance, decode: Instance, request: str, prompt: list[int]) -> float:
    """Seconds."""
    asked: dict[str, Any] = {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }  # fmt: skip
    if way.pushed:
        url = f"tcp://127.0.0.1:{way.prefill['port']}"
        decode.add(request, prompt, 1, {"do_remote_prefill": True, "transfer_id": request, "remote_urls": [url]})
        prefill.add(request, prompt, 1, {"do_remote_decode": True, "transfer_id": request})
    else:
        prefill.add(request, prompt, 1, asked)
        decode.add(request, prompt, 1, prefill.finished(request)["kv_transfer_params"])
    begin, end = prefill.finished(request)["at"], decode.finished(request)["at"]
    return float(end) - float(begin)


def measured(way: Way, model: Path, logs: Path, turns: int) -> dict[int, list[float]]:
    prefill = started(way, model, logs, "kv_producer", way.prefill)
    decode = started(way, model, logs, "kv_consumer", {})
    with instances(prefill, decode):
        handed_over(way, prefill, decode, "first", prompt_of(0, 64))  # connects
        before = decode.status()["computed"]
        times = {
            length: [
                handed_over(way, prefill, decode, f"{length}-{turn}", prompt_of(1000 * length + turn, length))
                for turn in range(turns)
            ]
            for length in LENGTHS
        }
        computed = decode.status()["computed"] - before
        assert computed == turns * len(LENGTHS), f"{way.name}: {computed} tokens were computed instead of loaded"
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", **SHAPE)
        print(f"{'milliseconds, median (least)':32}" + "".join(f"{length:>12} tokens" for length in LENGTHS))
        for way in ways():
            try:
                times = measured(way, model, Path(folder), arguments.turns)
            except AssertionError as error:
                print(f"{way.name:32} {error}", flush=True)
                continue
            cells = (f"{statistics.median(each) * 1e3:9.1f} ({min(each) * 1e3:.1f})" for each in times.values())
            print(f"{way.name:32}" + "".join(f"{cell:>19}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
