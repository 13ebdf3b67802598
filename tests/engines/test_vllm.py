# SPDX-License-Identifier: Apache-2.0
"""vLLM's own engine with kvferry's connector, in processes of their own. See tests/engines.sh."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port
from vllm_pair import (
    OPTIONS,
    PREFILL,
    PROMPTS,
    TOKENS,
    Instance,
    answers_to_all,
    computed_by,
    handed_over,
    instances,
    running,
)


@pytest.fixture(scope="module")
def prefill(model: Path, logs: Path) -> Iterator[Instance]:
    yield from running(Instance(model, logs / "prefill.log", "kv_producer", OPTIONS, num_gpu_blocks_override=1000))


@pytest.fixture(scope="module")
def decode(model: Path, logs: Path) -> Iterator[Instance]:
    """Has another number of blocks than the prefilling one."""
    yield from running(Instance(model, logs / "decode.log", "kv_consumer", OPTIONS, num_gpu_blocks_override=700))


@pytest.fixture(scope="module")
def second_decode(model: Path, logs: Path) -> Iterator[Instance]:
    """Has smaller blocks, and asks for checksums."""
    options = {**OPTIONS, "checksums": True}
    yield from running(
        Instance(model, logs / "decode2.log", "kv_consumer", options, num_gpu_blocks_override=900, block_size=64)
    )


def hand_over_all(prefill: Instance, decodes: list[Instance]) -> dict[str, list[int]]:
    return answers_to_all(
        lambda decode, request, name: handed_over(prefill, decode, request, PROMPTS[name], TOKENS), decodes
    )


def test_a_pair_says_what_a_single_instance_says_and_computes_no_prompt_twice(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance
) -> None:
    before = computed_by(prefill), computed_by(decode)
    assert hand_over_all(prefill, [decode]) == expected
    assert computed_by(prefill) - before[0] == sum(map(len, PROMPTS.values()))
    # Of a prompt the decoding instance computes its last token, which gives the first of the answer.
    assert computed_by(decode) - before[1] == len(PROMPTS) * TOKENS
    print(paths := decode.paths())
    assert paths and all(path.startswith("tcp") for path in paths)
    prefill.wait_until_no_blocks_are_used(60)
    decode.wait_until_no_blocks_are_used(60)


def test_requests_that_are_aborted_at_random(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance
) -> None:
    """None that finishes says anything wrong, and no block is lost."""
    source = random.Random(3)
    until = time.monotonic() + float(os.environ.get("KVFERRY_ENGINES_ABORT_SECONDS", "20"))
    finished = aborted = 0
    while time.monotonic() < until:
        names = {f"{name}-{source.random()}": name for name in source.sample(sorted(PROMPTS), 8)}
        for request, name in names.items():
            prefill.add(request, PROMPTS[name], 1, dict(PREFILL))
        early = {request for request in names if source.random() < 0.15}
        for request in early:
            prefill.abort(request)
        begun = [request for request in names if request not in early or prefill.is_finished(request)]
        late = set()
        for request in begun:
            params = prefill.finished(request)["kv_transfer_params"]
            if params is None:
                continue  # aborted, and it had ended
            decode.add(request, PROMPTS[names[request]], TOKENS, params)
            late.add(request)
        for request in [request for request in late if source.random() < 0.5]:
            time.sleep(source.random() * 0.01)
            decode.abort(request)
            aborted += 1
            if not decode.is_finished(request):
                late.discard(request)
        for request in late:
            answer = decode.finished(request)
            if answer["reason"] != "abort":
                assert answer["tokens"] == expected[names[request]]
                finished += 1
    print(f"{finished} finished, {aborted} aborted")
    assert finished and aborted
    prefill.wait_until_no_blocks_are_used(60)
    decode.wait_until_no_blocks_are_used(60)


def test_two_decoding_instances_share_a_prefilling_one(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance, second_decode: Instance
) -> None:
    before = computed_by(decode, second_decode)
    assert hand_over_all(prefill, [decode, second_decode]) == expected
    assert computed_by(decode, second_decode) - before == len(PROMPTS) * TOKENS
    prefill.wait_until_no_blocks_are_used(60)


def test_blocks_that_were_kept_for_a_killed_decoding_instance_come_back(
    expected: dict[str, list[int]], prefill: Instance, decode: Instance, second_decode: Instance
) -> None:
    names = list(PROMPTS)[:8]
    for name in names:
        handed_over(prefill, second_decode, f"killed-{name}", PROMPTS[name], 500)
    kept = [prefill_only(prefill, f"kept-{name}", name) for name in names]
    assert all(kept) and prefill.status()["blocks"]
    second_decode.kill()
    print(f"the blocks came back after {prefill.wait_until_no_blocks_are_used(60):.1f} s")
    # A lease that has run out is no lease: what another decoding instance reads then it computes.
    before = computed_by(decode)
    for name, params in zip(names, kept):
        decode.add(f"late-{name}", PROMPTS[name], TOKENS, params)
    for name in names:
        assert decode.finished(f"late-{name}")["tokens"] == expected[name]
    assert computed_by(decode) - before == sum(len(PROMPTS[name]) + TOKENS - 1 for name in names)


def prefill_only(prefill: Instance, request: str, name: str) -> Any:
    prefill.add(request, PROMPTS[name], 1, dict(PREFILL))
    return prefill.finished(request)["kv_transfer_params"]


def test_a_killed_prefilling_instance_and_its_successor(
    expected: dict[str, list[int]], decode: Instance, model: Path, logs: Path
) -> None:
    """Its blocks are larger ones' parts: what the decoding instance has in one block lies in four."""
    options = {**OPTIONS, "port": free_port()}
    first = Instance(model, logs / "prefill2.log", "kv_producer", options, num_gpu_blocks_override=3000, block_size=32)
    with instances(first):
        names = list(PROMPTS)
        kept = {name: prefill_only(first, f"first-{name}", name) for name in names[:8]}
        before = computed_by(decode)
        for name in names[:4]:
            decode.add(f"read-{name}", PROMPTS[name], TOKENS, kept[name])
            assert decode.finished(f"read-{name}")["tokens"] == expected[name]
        assert computed_by(decode) - before == 4 * TOKENS
        for name in names[:8]:
            decode.add(f"lost-{name}", PROMPTS[name], TOKENS, kept[name])
            if name == names[4]:
                first.kill()
        for name in names[:8]:
            assert decode.finished(f"lost-{name}")["tokens"] == expected[name]
    successor = Instance(
        model, logs / "prefill3.log", "kv_producer", options, num_gpu_blocks_override=3000, block_size=32
    )
    with instances(successor):
        for name in names[:4]:  # requests of the predecessor's
            decode.add(f"old-{name}", PROMPTS[name], TOKENS, kept[name])
        for name in names[:4]:
            assert decode.finished(f"old-{name}")["tokens"] == expected[name]
        before = computed_by(decode)
        assert hand_over_all(successor, [decode]) == expected
        assert computed_by(decode) - before == len(PROMPTS) * TOKENS
    decode.wait_until_no_blocks_are_used(60)
