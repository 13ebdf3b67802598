# SPDX-License-Identifier: Apache-2.0
"""Threads that share a channel."""

from __future__ import annotations

import threading

from conftest import PAGE, Pair


def test_blocking_calls_release_the_gil(pair: Pair) -> None:
    waiting = threading.Thread(target=pair.far.receive_notification)
    waiting.start()
    pair.near.notify("far", b"wake up")
    waiting.join(20)
    assert not waiting.is_alive()


def test_threads_share_a_channel(pair: Pair) -> None:
    failures: list[BaseException] = []

    def work(page: int) -> None:
        try:
            for _ in range(50):
                pair.near.batched_write([bytes([page]) * PAGE], "far", remote_indexes=[page])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(page,)) for page in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert all((pair.far_cache[page] == page).all() for page in range(8))
