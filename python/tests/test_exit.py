# SPDX-License-Identifier: Apache-2.0
"""The interpreter's exit."""

from __future__ import annotations

from conftest import TWO_CHANNELS, check, run_python


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
