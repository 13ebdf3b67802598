# SPDX-License-Identifier: Apache-2.0
"""Limits of a process's: where no descriptor is left, and no sleep is possible."""

from __future__ import annotations

from conftest import TWO_CHANNELS, check, run_python


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
