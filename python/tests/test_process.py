# SPDX-License-Identifier: Apache-2.0
"""What a channel does to the process that it lives in: signals, exit, fork, garbage, interpreters."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import weakref

import kvferry
import pytest
from conftest import PAGE, TWO_CHANNELS, Pair, run_python


def check(program: str, output: str = "done") -> None:
    ran = run_python(program)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, output, ""), ran.stderr


class Interruption(Exception):
    pass


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_a_signal_ends_a_blocking_call(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        buffer = bytearray(8)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interruption):
            pair.near.batched_recv([buffer], "far", tag=4)
        buffer.append(0)  # nobody has it any more
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interruption):
            pair.near.receive_notification()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interruption):
            kvferry.CompletionQueue().wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert pair.near.stats()["transfers"]["recv"]["failures"] == {"cancelled": 1}


def test_a_signal_that_raises_nothing_ends_nothing(pair: Pair) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with pytest.raises(kvferry.TransferTimeout):
            pair.near.receive_notification(0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(calls) > 1


def test_ctrl_c_is_a_keyboard_interrupt() -> None:
    check(
        TWO_CHANNELS
        + """
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    near.receive_notification()
except KeyboardInterrupt:
    print("done")
"""
    )


def test_blocking_calls_release_the_gil(pair: Pair) -> None:
    waiting = threading.Thread(target=pair.far.receive_notification)
    waiting.start()
    pair.near.notify("far", b"wake up")
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_lost_channel_is_closed(pair: Pair) -> None:
    channel = kvferry.TcpTransferChannel()
    channel.lazy_init_peer_connection("third", "far", pair.far.peer_init_url)
    queue = kvferry.CompletionQueue()
    buffer = bytearray(8)
    operation = channel.submit_recv(queue, [buffer], "far", tag=9)
    lost = weakref.ref(channel)
    del channel
    gc.collect()
    assert lost() is None
    assert queue.wait(20) and queue.drain() == [operation]
    assert operation.error is not None and operation.error.name == "closed"
    buffer.append(0)


def test_a_lost_queue_leaves_its_memory_to_the_channel(pair: Pair) -> None:
    queue = kvferry.CompletionQueue()
    buffer = bytearray(8)
    pair.near.submit_recv(queue, [buffer], "far", tag=9)
    del queue
    gc.collect()
    with pytest.raises(BufferError):
        buffer.append(0)
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    assert buffer == b"arrives."
    kvferry.CompletionQueue()  # the next of any lets go of what has ended
    buffer.append(0)


def test_the_interpreters_exit_ends_everything() -> None:
    check(
        TWO_CHANNELS
        + """
queue = kvferry.CompletionQueue()
buffer = bytearray(1 << 20)
for tag in range(50):
    near.submit_recv(queue, [buffer], "far", tag=tag)
def again_and_again(call):
    while True:
        try:
            call()
        except kvferry.TransferError:
            pass
for call in near.receive_notification, kvferry.CompletionQueue().wait, lambda: near.fence("far"):
    threading.Thread(target=again_and_again, args=[call], daemon=True).start()
class Loud(kvferry.TcpTransferChannel):
    def handle_init_side_msg(self, message):
        return message
loud = Loud(peer_init_url="tcp://127.0.0.1:0")
print("done")
"""
    )


def test_an_exit_with_an_unhandled_exception_ends_too() -> None:
    ran = run_python(TWO_CHANNELS + "near.batched_write([b'x'], 'nobody')")
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1].startswith("kvferry._errors.TransferError")


def test_no_channel_is_made_while_the_interpreter_exits() -> None:
    check(
        """
import atexit
def late():
    try:
        kvferry.TcpTransferChannel()
    except kvferry.TransferError as error:
        print("done" if error.name == "closed" else error)
atexit.register(late)
import kvferry
"""
    )


def test_a_forked_child_makes_its_own_channels() -> None:
    check(
        TWO_CHANNELS
        + """
queue = kvferry.CompletionQueue()
operation = near.submit_recv(queue, [bytearray(8)], "far", tag=1)
waiting = threading.Thread(target=far.receive_notifications, args=(8, 1))
waiting.start()
child = os.fork()
if child == 0:
    try:
        near.batched_write([b"x"], "far", remote_indexes=[0])
        os._exit(1)
    except kvferry.TransferError as error:
        if error.name != "forked":
            os._exit(2)
    if queue.drain() or operation.done():
        os._exit(3)
    del queue, operation, near
    own = kvferry.TcpTransferChannel()
    own.lazy_init_peer_connection("child", "far", far.peer_init_url)
    if own.batched_write([b"from the child"], "far", remote_indexes=[3], notification=b"n") != 1:
        os._exit(4)
    kvferry.flush_logs()
    sys.exit(0)  # as any program ends, through atexit
assert os.waitpid(child, 0)[1] == 0
assert far.receive_notification(20).peer_id == "child"
assert memory[3 * 4096 : 3 * 4096 + 14] == b"from the child"
near.notify("far", b"for the thread", 8)
waiting.join()
assert far.batched_send([b"parent's"], "near", tag=1, timeout=20) == 1
assert queue.wait(20) and queue.drain() == [operation] and operation.sizes == [8]
print("done")
"""
    )


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="_xxsubinterpreters has another name there")
@pytest.mark.parametrize("before", ["import kvferry", ""])
def test_a_sub_interpreter_is_refused(before: str) -> None:
    check(
        f"""
import _xxsubinterpreters
{before}
interpreter = _xxsubinterpreters.create()
program = '''
try:
    import kvferry
except ImportError as error:
    assert "sub-interpreter" in str(error), error
else:
    raise AssertionError("imported")
'''
_xxsubinterpreters.run_string(interpreter, program)
print("done")
"""
    )


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
