# SPDX-License-Identifier: Apache-2.0
"""vLLM's own engine with a prefilling instance that pushes layer by layer. See tests/engines.sh."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from free_ports import free_port
from kvferry.vllm.connector import KvferryConnector, _Orders
from kvferry.vllm.layout import Field, KvLayout
from kvferry.vllm.options import Options
from kvferry.vllm.push_messages import Announced
from kvferry.vllm.push_worker import PushWorker
from kvferry.vllm.scheduler import Step
from vllm_pair import (
    OPTIONS,
    PATIENCE,
    PROMPTS,
    TOKENS,
    Instance,
    answers_to_all,
    computed_by,
    instances,
    running,
)

PUSH = {**OPTIONS, "mode": "push", "transport": "auto"}
#: Prompts are computed in up to four steps.
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 128}


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {**PUSH, "port": free_port()}


@pytest.fixture(scope="module")
def prefill(model: Path, logs: Path, options: dict[str, Any]) -> Iterator[Instance]:
    yield from running(
        Instance(model, logs / "push.log", "kv_producer", options, num_gpu_blocks_override=1000, **CHUNKS)
    )


@pytest.fixture(scope="module")
def decode(model: Path, logs: Path) -> Iterator[Instance]:
    """Has another number of blocks than the prefilling one."""
    yield from running(Instance(model, logs / "pushed.log", "kv_consumer", PUSH, num_gpu_blocks_override=700))


@pytest.fixture(scope="module")
def second_decode(model: Path, logs: Path) -> Iterator[Instance]:
    """Has smaller blocks, asks for checksums, and remembers prefixes."""
    pushed = {**PUSH, "checksums": True}
    yield from running(
        Instance(
            model, logs / "pushed2.log", "kv_consumer", pushed,
            num_gpu_blocks_override=900, block_size=64, enable_prefix_caching=True,
        )
    )  # fmt: skip


def to_both(
    prefill: Instance, decode: Instance, options: dict[str, Any], request: str, name: str, tokens: int = TOKENS,
    workers: int = 1, prefilled: int = 1,
) -> None:  # fmt: skip
    """What a router does with a request. prefilled: how many tokens of the answer are made where the prompt is computed."""
    transfer = f"{request}-{random.random()}"
    decode.add(request, PROMPTS[name], tokens, taken_from(options, transfer, workers))
    prefill.add(request, PROMPTS[name], prefilled, {"do_remote_decode": True, "transfer_id": transfer})


def taken_from(options: dict[str, Any], transfer: str, workers: int = 1) -> dict[str, Any]:
    """What the decoding instance is told."""
    urls = [f"tcp://127.0.0.1:{options['port'] + rank}" for rank in range(workers)]
    return {"do_remote_prefill": True, "transfer_id": transfer, "remote_urls": urls}


def hand_over_all(
    prefill: Instance, decodes: list[Instance], options: dict[str, Any], workers: int = 1
) -> dict[str, list[int]]:
    """workers: how many the prefilling instance has."""
    return answers_to_all(
        lambda decode, request, name: to_both(prefill, decode, options, request, name, workers=workers), decodes
    )


def test_a_pair_says_what_a_single_instance_says_and_computes_no_prompt_twice(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance, options: dict[str, Any]
) -> None:
    before = computed_by(prefill), computed_by(decode)
    assert hand_over_all(prefill, [decode], options) == expected
    assert computed_by(prefill) - before[0] == sum(map(len, PROMPTS.values()))
    # Of a prompt the decoding instance computes its last token, which gives the first of the answer.
    assert computed_by(decode) - before[1] == len(PROMPTS) * TOKENS
    print(paths := decode.paths())
    assert paths and all(path.startswith("shm") for path in paths)
    prefill.wait_until_no_blocks_are_used(60)
    decode.wait_until_no_blocks_are_used(60)


def test_requests_that_are_aborted_at_random(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance, options: dict[str, Any]
) -> None:
    """On either side, at any time, also when the prompt has been computed. None that finishes says anything wrong, and no
    block is lost."""
    source = random.Random(5)
    until = time.monotonic() + float(os.environ.get("KVFERRY_ENGINES_ABORT_SECONDS", "20"))
    finished = aborted = 0
    while time.monotonic() < until:
        names = {f"{name}-{source.random()}": name for name in source.sample(sorted(PROMPTS), 8)}
        for request, name in names.items():
            to_both(prefill, decode, options, request, name, prefilled=source.choice([1, TOKENS]))
        for request in names:
            if source.random() < 0.4:
                time.sleep(source.random() * 0.02)
                (prefill if source.random() < 0.3 else decode).abort(request)
                aborted += 1
        for request, name in names.items():
            if not decode.is_aborted(request) or decode.is_finished(request):
                answer = decode.finished(request)
                if answer["reason"] != "abort":
                    assert answer["tokens"] == expected[name]
                    finished += 1
    print(f"{finished} finished, {aborted} aborted")
    assert finished and aborted
    prefill.wait_until_no_blocks_are_used(60)
    decode.wait_until_no_blocks_are_used(60)


def test_two_decoding_instances_share_a_prefilling_one(
    expected: dict[str, list[int]],
    prefill: Instance,
    decode: Instance,
    second_decode: Instance,
    options: dict[str, Any],
) -> None:
    before = computed_by(decode, second_decode)
    assert hand_over_all(prefill, [decode, second_decode], options) == expected
    assert computed_by(decode, second_decode) - before == len(PROMPTS) * TOKENS
    # Now one of them has the prompts' first blocks, and is pushed the rest.
    assert hand_over_all(prefill, [second_decode, decode], options) == expected
    assert hand_over_all(prefill, [decode, second_decode], options) == expected
    assert computed_by(decode, second_decode) - before == 3 * len(PROMPTS) * TOKENS
    prefill.wait_until_no_blocks_are_used(60)


def test_heads_go_from_two_workers_to_one_from_one_to_two_and_from_two_to_two(
    expected: dict[str, list[int]],
    prefill: Instance,
    decode: Instance,
    options: dict[str, Any],
    model: Path,
    logs: Path,
) -> None:
    """A worker is a process, and pushes what it has of the heads."""
    parallel_options = {**PUSH, "port": free_port(2)}
    arguments: dict[str, Any] = {"tensor_parallel_size": 2, "block_size": 64, "num_gpu_blocks_override": 1000}
    parallel, parallel_decode = (
        Instance(model, logs / f"two-{role}.log", role, extra, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, **arguments)
        for role, extra in (("kv_producer", parallel_options), ("kv_consumer", PUSH))
    )
    with instances(parallel, parallel_decode):
        for source, own, workers, target in (
            (parallel, parallel_options, 2, decode),
            (prefill, options, 1, parallel_decode),
            (parallel, parallel_options, 2, parallel_decode),
        ):
            before = computed_by(target)
            assert hand_over_all(source, [target], own, workers) == expected
            assert computed_by(target) - before == len(PROMPTS) * TOKENS
            source.wait_until_no_blocks_are_used(60)
            target.wait_until_no_blocks_are_used(60)


def test_a_prompt_whose_blocks_were_taken_from_it_is_computed(
    expected: dict[str, list[int]], decode: Instance, model: Path, logs: Path
) -> None:
    """The prefilling instance has blocks for one long prompt, and begins to compute several at a time."""
    options = {**PUSH, "port": free_port()}
    small = Instance(
        model, logs / "small.log", "kv_producer", options, block_size=32, num_gpu_blocks_override=20,
        max_model_len=512, enable_chunked_prefill=True, max_num_batched_tokens=128, long_prefill_token_threshold=32,
        scheduler_reserve_full_isl=False,
    )  # fmt: skip
    with instances(small):
        until = time.monotonic() + 120
        while "its blocks were taken from it" not in decode.log.read_text():
            assert time.monotonic() < until
            assert hand_over_all(small, [decode], options) == expected
        small.wait_until_no_blocks_are_used(60)
    decode.wait_until_no_blocks_are_used(60)


def test_blocks_that_are_lost_are_lost_before_vllm_copies_any() -> None:
    """It has copies made before it binds a step's orders."""
    cache = np.zeros((4, 64), dtype=np.uint8)
    layout = KvLayout(
        kind="", layers=(("layer", 0, 0),), num_blocks=4, blocks_per_id=1, block_tokens=4, block_stride=64, heads=1,
        head_stride=64, run_tokens=1, fields=(Field(0, 1, 0, 16, 16),), total_heads=1, tp_rank=0, tp_size=1,
    )  # fmt: skip
    worker = PushWorker(Options(), "one", layout, [(cache.ctypes.data, cache.nbytes)], True, False)
    connector = object.__new__(KvferryConnector)
    connector._worker = worker
    try:
        worker.begin(Step(announced=[Announced("p", "t", "", 4), Announced("q", "u", "", 4)]))
        connector.handle_preemptions(_Orders(Step(preempted=["p"], forgotten=["q"])))
        assert not worker._pushes.knows("p") and not worker._pushes.knows("q")
    finally:
        worker.close()


def test_an_instance_that_would_push_and_be_pushed_to_does_not_start(model: Path, logs: Path) -> None:
    instance = Instance(model, logs / "both.log", "kv_both", {**PUSH, "port": free_port()})
    try:
        assert instance.process.wait(PATIENCE) != 0
    finally:
        instance.kill()
    assert "kv_role is 'kv_producer' or 'kv_consumer', and not 'kv_both'" in instance.log.read_text()


def test_blocks_that_were_kept_for_a_killed_decoding_instance_come_back(
    prefill: Instance, second_decode: Instance, options: dict[str, Any]
) -> None:
    for name in list(PROMPTS)[:8]:
        to_both(prefill, second_decode, options, f"killed-{name}", name, 500)
        prefill.add(f"kept-{name}", PROMPTS[name], 1, {"do_remote_decode": True, "transfer_id": f"kept-{name}"})
        prefill.finished(f"kept-{name}")
    assert prefill.status()["blocks"]
    second_decode.kill()
    print(f"the blocks came back after {prefill.wait_until_no_blocks_are_used(60):.1f} s")


def find_again(prefill: Instance, decode: Instance, options: dict[str, Any]) -> None:
    """Who was not there is asked again when a lease has passed. What is wanted before is computed."""
    until = time.monotonic() + 3 * options["lease"]
    for attempt in itertools.count():
        before = computed_by(decode)
        to_both(prefill, decode, options, f"found-{attempt}", "r1")
        decode.finished(f"found-{attempt}")
        if computed_by(decode) - before == TOKENS:
            return
        assert time.monotonic() < until


def test_a_killed_prefilling_instance_and_its_successor(
    expected: dict[str, list[int]], decode: Instance, model: Path, logs: Path
) -> None:
    """Its blocks are smaller: what the decoding instance has in one block lies in four. And it remembers prefixes."""
    options = {**PUSH, "port": free_port()}

    def instance(log: str) -> Instance:
        return Instance(
            model, logs / log, "kv_producer", options,
            num_gpu_blocks_override=3000, block_size=32, enable_prefix_caching=True, **CHUNKS,
        )  # fmt: skip

    first = instance("push2.log")
    names = list(PROMPTS)[:8]
    with instances(first):
        before = computed_by(decode)
        for name in names:
            to_both(first, decode, options, f"read-{name}", name)
        for name in names:
            assert decode.finished(f"read-{name}")["tokens"] == expected[name]
        assert computed_by(decode) - before == len(names) * TOKENS
        for name in names[:4]:  # these wait for what doesn't come
            decode.add(f"lost-{name}", PROMPTS[name], TOKENS, taken_from(options, f"lost-{name}"))
        for name in names[4:]:
            to_both(first, decode, options, f"lost-{name}", name)
        first.kill()
        for name in names:
            assert decode.finished(f"lost-{name}")["tokens"] == expected[name]
        lost = sum(len(PROMPTS[name]) - 1 for name in names[:4])
        assert computed_by(decode) - before >= 2 * len(names) * TOKENS + lost
    with instances(successor := instance("push3.log")):
        find_again(successor, decode, options)
        before = computed_by(decode)
        assert hand_over_all(successor, [decode], options) == expected
        first_time = computed_by(successor)
        assert hand_over_all(successor, [decode], options) == expected  # its blocks are there
        assert computed_by(successor) - first_time < first_time / 4
        assert computed_by(decode) - before == 2 * len(PROMPTS) * TOKENS
    decode.wait_until_no_blocks_are_used(60)
