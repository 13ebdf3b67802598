# SPDX-License-Identifier: Apache-2.0
"""What a channel does to the process that it lives in: signals, exit, fork, garbage, interpreters."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import kvferry
import pytest
from conftest import (
    PAGE,
    TWO_CHANNELS,
    Interruption,
    Pair,
    becomes,
    each_step_of,
    interrupted_at_return_of,
    receives_nothing,
    run_python,
    signal_when,
    waits,
)


def check(program: str, output: str = "done") -> None:
    ran = run_python(program)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, output, ""), ran.stderr


def is_let_go(buffer: bytearray) -> bool:
    """Whether no operation holds it, which the next queue of any finds out."""
    kvferry.CompletionQueue()
    try:
        buffer.append(0)
    except BufferError:
        return False
    return True


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_a_signal_ends_a_blocking_call(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        buffer = bytearray(8)
        with pytest.raises(Interruption):
            signal_when(lambda: pair.near.stats()["transfers"]["recv"]["in_flight"] == 1, signal.SIGALRM)
            pair.near.batched_recv([buffer], "far", tag=4)
        buffer.append(0)  # nobody has it any more
        with pytest.raises(Interruption):
            signal_when(waits(pair.near), signal.SIGALRM)
            pair.near.receive_notification(60)
        with pytest.raises(Interruption):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
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
        until = time.monotonic() + 60
        while len(calls) < 2 and time.monotonic() < until:
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
try:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
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
    assert becomes(lambda: is_let_go(buffer))


def test_a_blocking_call_lets_go_of_what_a_lost_queue_left(pair: Pair) -> None:
    buffer = bytearray(8)
    pair.near.submit_recv(kvferry.CompletionQueue(), [buffer], "far", tag=9)
    gc.collect()
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    until = time.monotonic() + 20
    while True:
        pair.near.notify("far", b"any call")
        try:
            buffer.append(0)
            break
        except BufferError:
            assert time.monotonic() < until
            time.sleep(0.001)  # notifications that nobody takes are bounded


def test_a_lost_queue_loses_no_result(pair: Pair) -> None:
    def end_of(operation: kvferry.Operation) -> Any:
        gc.collect()
        until = time.monotonic() + 20
        while not operation.done():
            assert time.monotonic() < until
            time.sleep(0.001)
        return operation.result()

    one = pair.far.submit_receive_notification(kvferry.CompletionQueue(), 20)
    several = pair.far.submit_receive_notifications(kvferry.CompletionQueue(), 3, 1, 20)
    gc.collect()
    pair.near.notify("far", b"one")
    pair.near.notify("far", b"of several", 3)
    assert end_of(one).payload == b"one"
    assert [each.payload for each in end_of(several)] == [b"of several"]
    with kvferry.TcpTransferChannel() as third:
        metadata = pair.far.local_metadata("far")
        assert end_of(third.submit_connect(kvferry.CompletionQueue(), "third", metadata)).id == "far"


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
region = kvferry.Region(bytearray(4096), 4096)
of_parent = kvferry.CompletionQueue()
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
    if len(queue) != 1 or queue.fileno() < 0 or near.peers() or near.stats()["connected_peers"]:
        os._exit(9)
    for refused in far.receive_notification, lambda: far.local_metadata("far"), lambda: far.add_region(region):
        try:
            refused()
            os._exit(10)
        except kvferry.TransferError as error:
            if error.name != "forked":
                os._exit(11)
    near.close()
    try:
        queue.wait()
        os._exit(5)
    except kvferry.TransferError as error:
        if error.name != "forked":
            os._exit(6)
    del queue, operation, near
    own = kvferry.TcpTransferChannel()
    own.lazy_init_peer_connection("child", "far", far.peer_init_url)
    if own.batched_write([b"from the child"], "far", remote_indexes=[3], notification=b"n") != 1:
        os._exit(4)
    try:
        own.submit_write(of_parent, [b"lost"], "far", remote_indexes=[4])
        os._exit(7)
    except kvferry.TransferError as error:
        if error.name != "forked" or len(of_parent):
            os._exit(8)
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
    assert "subinterpreter" in str(error).replace("-", ""), error  # from CPython 3.12 on it refuses by itself
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


def test_a_signal_that_another_thread_got_ends_a_blocking_call() -> None:
    check(
        TWO_CHANNELS
        + """
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
try:
    threading.Timer(0.3, signal.pthread_kill, (other.ident, signal.SIGINT)).start()
    near.receive_notification(60)
except KeyboardInterrupt:
    print("done")
"""
    )


def test_the_thread_of_log_records_takes_no_signals(pair: Pair) -> None:
    kvferry.flush_logs()  # it has begun
    [forwards] = [thread for thread in threading.enumerate() if thread.name == "kvferry-log"]
    with open(f"/proc/self/task/{forwards.native_id}/status") as status:
        [blocked] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk:")]
    assert blocked & 1 << signal.SIGINT - 1 and not blocked & 1 << signal.SIGSEGV - 1


def receive_until_interrupted(
    pair: Pair, interrupt: Callable[..., None], receive: Callable[[], object] | None = None
) -> None:
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interruption):
            signal_when(waits(pair.near), signal.SIGALRM)
            if receive is not None:
                receive()
            else:
                pair.near.receive_notification(60)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_an_interrupted_call_had_taken_is_for_the_next(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    receive_until_interrupted(pair, interrupt)
    assert pair.near.receive_notification(20).payload == b"taken"


def test_what_an_interrupted_call_had_taken_is_for_a_thread_that_waits_already(pair: Pair) -> None:
    received: list[kvferry.Notification] = []
    thread = threading.Thread(target=lambda: received.append(pair.near.receive_notification(60)))

    def interrupt(*_: object) -> None:
        thread.start()
        assert becomes(waits(pair.near, 2))
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    receive_until_interrupted(pair, interrupt)
    thread.join()
    assert [notification.payload for notification in received] == [b"taken"]


@pytest.mark.parametrize("of", ["<lambda>", "was_cancelled"])
def test_what_a_call_that_is_interrupted_at_its_end_had_taken_is_for_the_next(pair: Pair, of: str) -> None:
    pair.far.notify("near", b"taken")
    with pytest.raises(Interruption), interrupted_at_return_of(of):
        pair.near.receive_notification()
    assert pair.near.receive_notification(20).payload == b"taken"
    with pytest.raises(kvferry.TransferTimeout):
        pair.near.receive_notification(0)


def test_what_a_call_that_is_interrupted_had_taken_of_what_is_kept_is_for_the_next(pair: Pair) -> None:
    with pytest.raises(Interruption), interrupted_at_return_of("was_cancelled"):
        pair.far.notify("near", b"kept", 7)
        pair.near.receive_notifications(7, 1, 60)
    with pytest.raises(Interruption), interrupted_at_return_of("take"):
        pair.near.receive_notifications(7, 2, 60)

    def end_it() -> None:
        if becomes(waits(pair.near)):
            pair.near._native.look_again(7)

    looks_again = threading.Thread(target=end_it)
    looks_again.start()
    with pytest.raises(Interruption), interrupted_at_return_of("put_back"):
        pair.near.receive_notifications(7, 2, 60)
    looks_again.join()
    assert [notification.payload for notification in pair.near.receive_notifications(7, 1, 20)] == [b"kept"]
    assert not pair.near.receive_notifications(7, 1, 0)


def test_a_signal_loses_nothing_of_what_was_left_wherever_it_comes(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        pair.far.notify("near", b"taken")  # which returns when the call that is interrupted has it
        raise Interruption

    native, queue = pair.near._native, kvferry.CompletionQueue()
    for receive_interrupted in each_step_of("keep_ended", lambda: receives_nothing(pair)):
        # Of an operation whose call in C++ was interrupted, and of one that was left.
        receive_until_interrupted(pair, interrupt, lambda: native.receive_notification(60, None, native.kept, []))
        operation = pair.near.submit_receive_notifications(queue, 7, 2)
        received: list[kvferry.Notification] = []
        thread = threading.Thread(target=lambda: received.extend(pair.near.receive_notifications(7, 2, 60)))
        thread.start()
        assert becomes(waits(pair.near))
        for payload in (b"1", b"2"):
            pair.far.notify("near", payload, 7)
        assert becomes(operation.done)
        pair.near._unclaimed.leave(operation)  # as its task does if that is interrupted
        receive_interrupted()
        thread.join()
        assert [notification.payload for notification in received] == [b"1", b"2"]
        assert pair.near.receive_notification(20).payload == b"taken"
        with pytest.raises(kvferry.TransferTimeout):
            pair.near.receive_notification(0)
        assert not pair.near.receive_notifications(7, 1, 0)


@pytest.mark.parametrize("of", ["take", "put_back", "keep_ended"])
@pytest.mark.parametrize("does", ["receives", "keeps", "receives and keeps"])
def test_a_handler_that_receives_itself_takes_nothing_twice_and_loses_nothing(pair: Pair, of: str, does: str) -> None:
    unclaimed, queue = pair.near._unclaimed, kvferry.CompletionQueue()
    numbers = itertools.count()
    came: list[bytes] = []
    received: list[bytes] = []

    def notify() -> None:
        came.append(str(next(numbers)).encode())
        pair.far.notify("near", came[-1], 7)

    def receive(count: int) -> None:
        received.extend(each.payload for each in pair.near.receive_notifications(7, count, 0))

    def leave(count: int) -> None:
        """What an operation has taken is kept in the next call."""
        operation = pair.near.submit_receive_notifications(queue, 7, count)
        for _ in range(count):
            notify()
        assert becomes(operation.done)
        unclaimed.leave(operation)

    def handle() -> None:
        if "receives" in does:
            receive(1)
        if "keeps" in does:
            leave(1)
            unclaimed.keep_ended()

    def call() -> None:
        if of == "put_back":
            taken: list[kvferry.Notification] = []
            unclaimed.take(7, 2, taken)
            unclaimed.put_back(7, taken, True)
        elif of == "take":
            receive(2)
        else:
            unclaimed.keep_ended()

    for call_interrupted in each_step_of(of, call, handle):
        leave(2)
        if of != "keep_ended":
            unclaimed.keep_ended()
        call_interrupted()
        receive(100)
        assert sorted(received) == sorted(came) and not unclaimed._kept


def test_a_signal_that_comes_while_a_call_waits_for_the_gil_loses_nothing(pair: Pair) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    main, called, queue = threading.get_ident(), threading.Event(), kvferry.CompletionQueue()

    def be_busy() -> None:
        """Has the GIL from when the main thread sleeps in its call until the signal is there."""
        called.wait(20)
        notified = pair.far.submit_notify(queue, "near", b"taken")
        while not notified.done():  # until the call has it
            pass
        until = time.monotonic() + 0.1
        while time.monotonic() < until:  # the call's thread wakes
            pass
        signal.pthread_kill(main, signal.SIGALRM)

    busy = threading.Thread(target=be_busy)
    before, interval = signal.signal(signal.SIGALRM, interrupt), sys.getswitchinterval()
    try:
        busy.start()
        sys.setswitchinterval(20.0)
        called.set()
        with pytest.raises(Interruption):
            pair.near.receive_notification()
    finally:
        sys.setswitchinterval(interval)
        busy.join()
        signal.signal(signal.SIGALRM, before)
    assert pair.near.receive_notification(20).payload == b"taken"


def test_a_call_that_cant_sleep_ends_its_operation() -> None:
    check(
        TWO_CHANNELS
        + """
import resource, time
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
def allow_no_ppoll(*_):
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
signal.signal(signal.SIGALRM, allow_no_ppoll)
def of_handshakes():
    "Their threads, and how often each has gone to sleep; nothing where one is awake."
    asleep = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as lines:
            status = dict(line.strip().split(":", 1) for line in lines)
        if status["Name"].strip() == "kvferry-zmq":
            asleep[task] = status["voluntary_ctxt_switches"] if "S" in status["State"].split()[0] else None
    return asleep if len(asleep) == 2 and None not in asleep.values() else None
def send_signal_in_the_call(to):
    while near.stats()["transfers"]["recv"]["in_flight"] == 0:
        pass
    # ZeroMQ's poll ends the process if it is refused: until the handshake's threads are in it, and stay there.
    until, before = time.monotonic() + 20, None
    while (before is None or before != of_handshakes()) and time.monotonic() < until:
        before = of_handshakes()
        threading.Event().wait(0.2)
    signal.pthread_kill(to, signal.SIGALRM)
buffer = bytearray(8)
threading.Thread(target=send_signal_in_the_call, args=[threading.get_ident()]).start()
try:
    near.batched_recv([buffer], "far", tag=1)
except Exception as error:
    assert "ppoll" in str(error), error
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    recv = near.stats()["transfers"]["recv"]
    assert (recv["failures"], recv["in_flight"]) == ({"cancelled": 1}, 0), recv
    print("done")
"""
    )


def test_nothing_is_started_that_cant_be_waited_for() -> None:
    program = """
import os, resource, select
import kvferry
far = kvferry.TcpTransferChannel(peer_init_url="tcp://127.0.0.1:0")
near = kvferry.TcpTransferChannel()
queue = kvferry.CompletionQueue()
near.submit_lazy_init_peer_connection(queue, "near", "far", far.peer_init_url)
select.select([queue], [], [])
queue.drain()[0].result()
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 256), limits[1]))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    os.close(taken.pop())  # for the call's own queue
try:
    near.batched_recv([bytearray(8)], "far", tag=1, timeout=0.2)
except kvferry.TransferTimeout:
    print("could be waited for")
except Exception as error:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert near.stats()["transfers"]["recv"]["started"] == 0, error
    print("done")
"""
    # The handshake's descriptors may be closed when all others have been taken, and be enough for the call: then once more.
    for _ in range(10):
        ran = run_python(program)
        if ran.stdout.strip() != "could be waited for":
            break
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "done", ""), ran.stderr


def test_the_exit_ends_handlers_that_wait_for_each_others_channels() -> None:
    check(
        """
import threading
import kvferry
entered = threading.Semaphore(0)
class Waiting(kvferry.TcpTransferChannel):
    def handle_init_side_msg(self, message):
        entered.release()
        other = channels[1] if self is channels[0] else channels[0]
        other.receive_notification()
channels = [Waiting(peer_init_url="tcp://127.0.0.1:0") for _ in range(2)]
asker = kvferry.TcpTransferChannel()
queue = kvferry.CompletionQueue()
for channel in channels:
    asker.submit_send_init_side_msg(queue, channel.peer_init_url, kvferry.SideMessage.decode(b"\\x81\\xa4type\\xa1q"))
for channel in channels:
    entered.acquire()
threading.Event().wait(0.2)
print("done")
"""
    )


def test_a_queue_and_what_belongs_to_its_operations_are_collected(pair: Pair) -> None:
    class Program:
        pass

    queue, buffer, program = kvferry.CompletionQueue(), bytearray(8), Program()
    operation = pair.near.submit_recv(queue, [buffer], "far", tag=9)
    operation.user_data = [queue, operation, program]
    lost = weakref.ref(queue), weakref.ref(program)
    gc.collect()
    assert operation.user_data == [queue, operation, program]
    del queue, program
    gc.collect()
    assert lost[0]() is not None and lost[1]() is not None
    del operation
    gc.collect()
    assert lost[0]() is None and lost[1]() is None
    with pytest.raises(BufferError):
        buffer.append(0)  # it is the channel's until the operation ends
    assert pair.far.batched_send([b"arrives."], "near", tag=9, timeout=20) == 1
    assert buffer == b"arrives."
    assert becomes(lambda: is_let_go(buffer))


def test_an_operation_that_ended_is_collected_with_its_user_data(pair: Pair) -> None:
    class Program:
        operation: kvferry.Operation

    queue, program = kvferry.CompletionQueue(), Program()
    program.operation = pair.near.submit_write(queue, [b"x"], "far", remote_indexes=[0])
    program.operation.user_data = program
    assert queue.wait(20) and queue.drain() == [program.operation]
    lost = weakref.ref(program)
    del program
    gc.collect()
    assert lost() is None


def test_the_exit_goes_on_where_a_part_of_it_fails() -> None:
    ran = run_python(
        """
import atexit, threading
def say():
    print([thread.name for thread in threading.enumerate()])
atexit.register(say)
import kvferry
channel = kvferry.TcpTransferChannel()
close_all = kvferry._kvferry.close_all
def failing():
    close_all()
    raise OSError("as it happens")
kvferry._kvferry.close_all = failing
"""
    )
    assert ran.stdout.strip() == "['MainThread']" and "as it happens" in ran.stderr
