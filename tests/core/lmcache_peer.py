# SPDX-License-Identifier: Apache-2.0
"""The peer of an LMCache `py_socket` channel: plain REQ and REP sockets, and msgspec's bytes.

    lmcache_peer.py client URL   asks a kvferry handshake service what LMCache would ask, and more
    lmcache_peer.py server       prints its url, answers one handshake and one side message, and ends
    lmcache_peer.py listener     prints its url, answers as LMCache's listener does until it has been asked for its lookup
                                 url, and ends; a message that LMCache doesn't know is its death

Says "ok" and exits with 0 if every byte was as expected.
"""

import sys

import msgpack
import zmq

TIMEOUT_MS = 60_000

P2P_INIT = bytes.fromhex("81a474797065ae503250496e6974536964654d7367")
P2P_INIT_RET = bytes.fromhex(
    "82a474797065b1503250496e6974536964655265744d7367af706565725f6c6f6f6b75705f75726cb3"
    "7463703a2f2f31302e302e302e373a35363030"
)
PY_SOCKET_REQUEST = bytes.fromhex(
    "82a474797065b35079536f636b6574496e697452657175657374ad706565725f696e69745f75726cad"
    "31302e302e302e373a35353535"
)
PY_SOCKET_RESPONSE = bytes.fromhex("82a474797065b45079536f636b6574496e6974526573706f6e7365a6737461747573a26f6b")


def fail(text):
    sys.exit(f"lmcache_peer.py: {text}")


def expect_equal(what, actual, expected):
    if actual != expected:
        fail(f"{what}: expected {expected!r}, got {actual!r}")


def make_socket(context, kind):
    socket = context.socket(kind)
    socket.linger = 0
    socket.rcvtimeo = TIMEOUT_MS
    socket.sndtimeo = TIMEOUT_MS
    return socket


def exchange(socket, *frames):
    socket.send_multipart(frames)
    reply = socket.recv_multipart()
    expect_equal("frames of the reply", len(reply), 1)
    return reply[0]


def expect_error(what, reply):
    message = msgpack.unpackb(reply)
    expect_equal(f"type of the reply to {what}", message["type"], "KvferryError")
    if not isinstance(message["code"], int) or not isinstance(message["message"], str):
        fail(f"reply to {what} is not an error: {message!r}")
    expect_equal(f"keys of the reply to {what}", list(message), ["type", "code", "message"])


def expect_lmcache_handshake(socket):
    expect_equal("answer to PySocketInitRequest", exchange(socket, PY_SOCKET_REQUEST), PY_SOCKET_RESPONSE)
    expect_equal("answer to P2PInitSideMsg", exchange(socket, P2P_INIT), P2P_INIT_RET)


def run_client(context, url):
    socket = make_socket(context, zmq.REQ)
    socket.connect(url)
    expect_lmcache_handshake(socket)

    with_unknown_key = msgpack.packb(
        {"later": [1, {"a": None}], "peer_init_url": "10.0.0.7:5555", "type": "PySocketInitRequest", "blob": b"\x00"}
    )
    expect_equal("answer to unknown keys", exchange(socket, with_unknown_key), PY_SOCKET_RESPONSE)

    expect_error("an unknown type", exchange(socket, msgpack.packb({"type": "NobodyKnowsThis", "x": 1})))
    expect_error("a missing field", exchange(socket, msgpack.packb({"type": "PySocketInitRequest"})))
    bin_for_str = msgpack.packb({"type": "PySocketInitRequest", "peer_init_url": b"x"})
    expect_error("a field of another kind", exchange(socket, bin_for_str))
    expect_error("an array", exchange(socket, msgpack.packb(["PySocketInitRequest"])))
    expect_error("no msgpack", exchange(socket, b"\xc1\xc1\xc1"))
    expect_error("nothing", exchange(socket, b""))
    expect_error("half a message", exchange(socket, PY_SOCKET_REQUEST[:-1]))
    expect_error("a message and a byte", exchange(socket, P2P_INIT + b"\x00"))
    expect_error("two frames", exchange(socket, P2P_INIT, P2P_INIT))
    expect_lmcache_handshake(socket)

    another = make_socket(context, zmq.REQ)
    another.connect(url)
    expect_lmcache_handshake(another)


def run_server(context):
    socket = make_socket(context, zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    for question, answer in ((PY_SOCKET_REQUEST, PY_SOCKET_RESPONSE), (P2P_INIT, P2P_INIT_RET)):
        expect_equal("question", socket.recv_multipart(), [question])
        socket.send(answer)
    # Without this the last answer could be thrown away by the end of the script.
    socket.linger = TIMEOUT_MS
    socket.close()


def run_listener(context):
    socket = make_socket(context, zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    kind = None
    while kind != "P2PInitSideMsg":
        message = msgpack.unpackb(socket.recv())
        kind = message["type"]
        if kind == "PySocketInitRequest" and isinstance(message["peer_init_url"], str):
            socket.send(PY_SOCKET_RESPONSE)
        elif kind == "P2PInitSideMsg":
            socket.send(P2P_INIT_RET)
        else:
            fail(f"a message that LMCache does not know: {message!r}")
    socket.linger = TIMEOUT_MS
    socket.close()


def main():
    context = zmq.Context()
    if sys.argv[1] == "client":
        run_client(context, sys.argv[2])
    elif sys.argv[1] == "server":
        run_server(context)
    else:
        run_listener(context)
    print("ok", flush=True)
    context.destroy()


if __name__ == "__main__":
    main()
