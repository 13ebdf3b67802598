# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from typing import Any

import kvferry
import pytest
from conftest import PAGE, Interruption, Pair, becomes, each_step_of, interrupted_at_return_of, receives_nothing, waits
from kvferry.aio import AsyncChannel


def test_operations_are_awaited(pair: Pair) -> None:
    async def main() -> None:
        near, far = AsyncChannel(pair.near), AsyncChannel(pair.far)
        threads = threading.active_count()
        assert await near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0], notification=b"hello") == 1
        assert (await far.receive_notification()).payload == b"hello"
        buffers = [bytearray(PAGE) for _ in range(200)]
        counts = await asyncio.gather(
            *(near.batched_read([buffer], "far", remote_indexes=[0]) for buffer in buffers)
        )
        assert counts == [1] * 200 and all(buffer == bytes([1]) * PAGE for buffer in buffers)
        received = bytearray(9)
        sizes, sent = await asyncio.gather(
            far.batched_recv([received], "near", tag=1), near.batched_send([b"together"], "far", tag=1)
        )
        assert list(sizes) == [8] and sent == 1 and received == b"together\0"
        await near.notify("far", b"k", 5)
        assert [n.payload for n in await far.receive_notifications(5, 1)] == [b"k"]
        await far.fence("near")
        number = far.add_region(kvferry.Region(bytearray(PAGE), PAGE))
        assert await near.batched_write([b"x"], "far", remote_indexes=[0], remote_region=number) == 1
        await far.remove_region(number, 20)
        assert (await far.wait_peer_event()).kind == "connected"
        assert threading.active_count() == threads
        await near.disconnect("far")
        await near.close()
        await far.close()

    asyncio.run(main())


def test_connecting_is_awaited(pair: Pair) -> None:
    async def main() -> None:
        async with AsyncChannel(kvferry.TcpTransferChannel()) as third:
            assert await third.lazy_init_peer_connection("third", "far", pair.far.peer_init_url) is None
            assert await third.batched_write([b"x"], "far", remote_indexes=[0]) == 1
        async with AsyncChannel(kvferry.TcpTransferChannel()) as fourth:
            assert (await fourth.connect("fourth", pair.far.local_metadata("far"))).id == "far"

    asyncio.run(main())


def test_failures_are_raised(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        with pytest.raises(kvferry.TransferError) as caught:
            await near.batched_write([b"x"], "far", remote_indexes=[10**6])
        assert caught.value.name == "index_out_of_range"
        waiting = asyncio.create_task(near.receive_notification())
        await asyncio.sleep(0)
        await near.close()
        with pytest.raises(kvferry.TransferError) as caught:
            await waiting
        assert caught.value.name == "closed"

    asyncio.run(main())


def test_a_cancelled_task_goes_on_when_its_operation_has_ended(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        buffer = bytearray(8)
        task = asyncio.create_task(near.batched_recv([buffer], "far", tag=2))
        await asyncio.sleep(0)
        with pytest.raises(BufferError):
            buffer.append(0)  # it is the channel's
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer.append(0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(near.receive_notification(), 0.05)
        await near.close()

    asyncio.run(main())


def test_another_loop_is_refused(pair: Pair) -> None:
    near = AsyncChannel(pair.near)

    async def use() -> None:
        await near.batched_write(kvferry.Pages([1]), "far", remote_indexes=[0])

    asyncio.run(use())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use())
    assert pair.near.stats()["transfers"]["write"]["started"] == 1


def test_what_a_cancelled_task_had_taken_is_for_the_next(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        alone = asyncio.create_task(near.receive_notification())
        await asyncio.sleep(0)
        pair.far.notify("near", b"taken")  # which returns when the task's operation has it
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        assert (await near.receive_notification(20)).payload == b"taken"
        with pytest.raises(kvferry.TransferTimeout):
            await near.receive_notification(0.01)

        task = asyncio.create_task(near.receive_notifications(7, 2))
        await asyncio.sleep(0)
        for payload in (b"1", b"2"):
            pair.far.notify("near", payload, 7)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [n.payload for n in await near.receive_notifications(7, 1)] == [b"1"]
        pair.far.notify("near", b"3", 7)
        assert [n.payload for n in await near.receive_notifications(7, 2, 20)] == [b"2", b"3"]

        assert (await near.wait_peer_event(20)).kind == "connected"
        news = asyncio.create_task(near.wait_peer_event())
        await asyncio.sleep(0)
        pair.far.close()
        assert near._queue.wait(20)
        news.cancel()
        with pytest.raises(asyncio.CancelledError):
            await news
        assert pair.near.wait_peer_event(20).kind == "gone"
        await near.close()

    asyncio.run(main())


def test_what_a_cancelled_task_had_taken_is_for_one_that_waits_already(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        first = asyncio.create_task(near.receive_notification())
        second = asyncio.create_task(near.receive_notification(60))
        await asyncio.sleep(0)
        pair.far.notify("near", b"for the first")
        first.cancel()
        assert (await second).payload == b"for the first"
        await near.close()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [0, 7, "peer event"])
def test_what_a_cancelled_task_had_taken_is_for_whoever_else_waits_already(pair: Pair, kind: int | str) -> None:
    def receive(of: Any) -> Any:
        if kind == "peer event":
            return of.wait_peer_event(60)
        return of.receive_notifications(kind, 1, 60) if kind else of.receive_notification(60)

    async def main() -> None:
        near, of_another_owner = AsyncChannel(pair.near), AsyncChannel(pair.near)
        if kind == "peer event":
            await near.wait_peer_event(20)  # of how the pair met
        for others in ("a task", "a thread"):
            first = asyncio.create_task(receive(near))
            await asyncio.sleep(0)
            received: list[object] = []
            thread = threading.Thread(target=lambda: received.append(receive(pair.near)))
            if others == "a thread":
                thread.start()
                assert becomes(waits(pair.near, 2))
            else:
                second = asyncio.create_task(receive(of_another_owner))
                await asyncio.sleep(0)
            if isinstance(kind, int):
                pair.far.notify("near", b"for the first", kind)
            elif others == "a task":
                pair.near.disconnect("far")
            else:
                pair.near.lazy_init_peer_connection("near", "far", pair.far.peer_init_url)
            assert near._queue.wait(20)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            if others == "a thread":
                await asyncio.to_thread(thread.join)
            else:
                received.append(await second)
            [result] = received
            if kind == "peer event":
                assert isinstance(result, kvferry.PeerEvent)
                assert (result.kind, result.peer_id) == ("gone" if others == "a task" else "connected", "far")
            else:
                assert "for the first" in str(result)
        await near.close()
        await of_another_owner.close()

    asyncio.run(main())


def receiving_in_a_loop(
    near: AsyncChannel[kvferry.TcpTransferChannel],
) -> tuple[asyncio.AbstractEventLoop, asyncio.Task[kvferry.Notification]]:
    async def begin() -> asyncio.Task[kvferry.Notification]:
        task = asyncio.create_task(near.receive_notification())
        await asyncio.sleep(0)
        return task

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # which is told that the task is destroyed
    return loop, loop.run_until_complete(begin())


def test_what_a_task_of_a_closed_loop_had_taken_is_for_the_next(pair: Pair) -> None:
    for taken in (True, False):
        loop, task = receiving_in_a_loop(AsyncChannel(pair.near))
        if taken:
            pair.far.notify("near", b"1")
        loop.close()
        if not taken:
            with pytest.raises(kvferry.TransferTimeout):
                pair.near.receive_notification(0)
            pair.far.notify("near", b"1")
        assert pair.near.receive_notification(20).payload == b"1"
        del task
        gc.collect()
        with pytest.raises(kvferry.TransferTimeout):
            pair.near.receive_notification(0)


def test_a_signal_loses_nothing_of_a_closed_loop_wherever_it_comes(pair: Pair) -> None:
    for receive_interrupted in each_step_of("keep_ended", lambda: receives_nothing(pair)):
        loop, task = receiving_in_a_loop(AsyncChannel(pair.near))
        pair.far.notify("near", b"1")
        loop.close()
        receive_interrupted()
        assert pair.near.receive_notification(20).payload == b"1"
        del task
        gc.collect()
        with pytest.raises(kvferry.TransferTimeout):
            pair.near.receive_notification(0)


async def all_end(near: AsyncChannel[kvferry.TcpTransferChannel], tasks: list[asyncio.Task[Any]]) -> None:
    _, waiting = await asyncio.wait(tasks, timeout=20)
    for ended in near._waiting.values():
        ended.set_result(None)  # else a loop whose test has failed waits for them
    assert not waiting


@pytest.mark.parametrize("closing", [False, True])
def test_a_signal_loses_no_end_of_an_operation_wherever_it_comes(pair: Pair, closing: bool) -> None:
    """Nor does the loop go on watching a channel that is closed."""
    failures: list[object] = []

    async def main(near: AsyncChannel[kvferry.TcpTransferChannel]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context.get("exception")))
        tasks = [asyncio.create_task(near.receive_notifications(key, 1)) for key in (7, 8)]
        tasks.append(asyncio.create_task(near.receive_notifications(7, 1)))
        await asyncio.sleep(0)
        left = pair.near.submit_receive_notifications(near._queue, 9, 1)
        for key in (9, 8, 7, 7):
            pair.far.notify("near", str(key).encode(), key)
        assert becomes(left.done)
        pair.near._unclaimed.leave(left)  # as its task does if that is interrupted
        await all_end(near, tasks)
        received = [notification.payload for task in tasks for notification in task.result()]
        assert received == [b"7", b"8", b"7"]
        assert [notification.payload for notification in await near.receive_notifications(9, 1, 20)] == [b"9"]

    async def close(near: AsyncChannel[kvferry.TcpTransferChannel]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context.get("exception")))
        task = asyncio.create_task(near.receive_notifications(8, 1))
        await asyncio.sleep(0)
        with contextlib.suppress(Interruption):
            await near.close()
        await all_end(near, [task])
        assert "closed" in str(task.exception())
        until = loop.time() + 20
        while near._loop is not None and loop.time() < until:
            await asyncio.sleep(0)
        assert not loop.remove_reader(near._queue.fileno())

    def call() -> None:
        if not closing:
            asyncio.run(main(AsyncChannel(pair.near)))
            return
        with kvferry.TcpTransferChannel() as channel:
            asyncio.run(close(AsyncChannel(channel)))

    for call_interrupted in each_step_of("_drain", call):
        call_interrupted()
    assert len(failures) > 10 and all(isinstance(failure, Interruption) for failure in failures)


@pytest.mark.parametrize("of", ["<lambda>", "was_cancelled"])
def test_what_a_task_that_is_interrupted_had_taken_is_for_the_next(pair: Pair, of: str) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        pair.far.notify("near", b"taken")
        with pytest.raises(Interruption), interrupted_at_return_of(of):
            await near.receive_notification()
        assert (await near.receive_notification(20)).payload == b"taken"
        with pytest.raises(kvferry.TransferTimeout):
            await near.receive_notification(0)
        await near.close()

    asyncio.run(main())


def test_what_a_task_that_is_interrupted_had_taken_of_what_is_kept_is_for_the_next(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        pair.far.notify("near", b"kept", 7)
        with pytest.raises(Interruption), interrupted_at_return_of("was_cancelled"):
            await near.receive_notifications(7, 1)
        with pytest.raises(Interruption), interrupted_at_return_of("take"):
            await near.receive_notifications(7, 2, 60)
        task = asyncio.create_task(near.receive_notifications(7, 2, 60))
        await asyncio.sleep(0)
        pair.near._native.look_again(7)
        with pytest.raises(Interruption), interrupted_at_return_of("put_back"):
            await task
        assert [n.payload for n in await near.receive_notifications(7, 1, 20)] == [b"kept"]
        assert not await near.receive_notifications(7, 1, 0)
        await near.close()

    asyncio.run(main())


def test_a_task_that_is_destroyed_leaves_nothing(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        waiting = near.receive_notification()
        waiting.send(None)  # as a task does
        assert len(near._waiting) == 1
        waiting.close()
        assert not near._waiting
        await near.close()

    asyncio.run(main())


def test_what_an_operation_takes_that_was_left_is_for_one_that_waits_already(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        operation = pair.near.submit_receive_notification(near._queue)
        waiting = asyncio.create_task(near.receive_notification(20))
        await asyncio.sleep(0)
        pair.far.notify("near", b"taken")
        pair.near._unclaimed.leave(operation)  # as its task does if that is interrupted a moment before
        assert (await waiting).payload == b"taken"
        await near.close()

    asyncio.run(main())


def test_a_lost_channel_isnt_kept_by_its_loop(pair: Pair) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        near = AsyncChannel(pair.near)
        await near.fence("far")
        lost, queue = weakref.ref(near), near._queue
        del near
        gc.collect()
        assert lost() is None
        assert not loop.remove_reader(queue.fileno())

    asyncio.run(main())


def test_a_closed_channel_leaves_its_loop_though_nobody_waits_for_its_close(pair: Pair) -> None:
    async def main() -> None:
        near = AsyncChannel(pair.near)
        waiting = asyncio.create_task(near.receive_notification())
        await asyncio.sleep(0)
        closing = asyncio.create_task(near.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        pair.near.close()
        with pytest.raises(kvferry.TransferError, match="closed"):
            await waiting
        assert not asyncio.get_running_loop().remove_reader(near._queue.fileno())

    asyncio.run(main())
