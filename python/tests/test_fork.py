# SPDX-License-Identifier: Apache-2.0
"""Forked children and other interpreters in the process."""

from __future__ import annotations

import sys

import pytest
from conftest import TWO_CHANNELS, check


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
