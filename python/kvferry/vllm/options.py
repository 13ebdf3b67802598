# SPDX-License-Identifier: Apache-2.0
"""``kv_connector_extra_config``. Needs no vLLM."""

from __future__ import annotations

import ipaddress
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import kvferry

__all__ = ["Options", "channel_class", "channel_keywords", "is_allowed", "url_of"]

_CHANNELS = {
    "tcp": "TcpTransferChannel",
    "rdma": "RdmaTransferChannel",
    "shm": "ShmTransferChannel",
    "auto": "AutoTransferChannel",
}

_LOOPBACK = ("127.0.0.0/8", "::1", "localhost")

#: Bytes.
_LEAST_SECRET = 16


@dataclass(frozen=True)
class Options:
    """The members of ``kv_connector_extra_config``. Times are in seconds."""

    #: "pull": decoding instances read when the prompt is computed. "push": prefilling ones write while they compute it.
    #: Both sides have the same.
    mode: str = "pull"
    #: "tcp", "rdma"; "shm": within a host; "auto": the best of shm and TCP, or of ``roads`` in ``channel_options``. Both
    #: sides have the same.
    transport: str = "tcp"
    #: The address at which a prefilling instance answers the decoding ones.
    host: str = "127.0.0.1"
    #: Its first worker's port; the next worker has the next. 0: any free port, which requests carry along.
    port: int = 0
    #: The host that the decoding instances are told, where it differs from ``host``.
    advertised_host: str = ""
    #: How long a prefilling instance keeps a request's blocks after the last sign of a decoding one. Decoding instances
    #: renew as often as the shorter one of both sides' leases wants.
    lease: float = 30.0
    #: How long a step of a load may take - to connect, to read, to be told whether the lease held - before it failed.
    timeout: float = 10.0
    #: Whether this instance compares what it reads with checksums. Has no effect on what others read from it. What is
    #: pushed has them if the decoding instance wants them, or else the prefilling one.
    checksums: bool | None = None
    #: Instances load only from those with the same. Left out: vLLM's name of the model.
    model_id: str = ""
    #: The hosts that a request's urls may name: addresses, ranges ("10.1.0.0/16"), names. Left out: any; with mode
    #: "push", without a secret_file and a keyring, this host's loopback alone. Of names the text counts; they are not
    #: looked up.
    allowed_hosts: tuple[str, ...] = ()
    #: Which instance this is, in keyrings: worker ``r`` is there "ID/r". Left out: ids that are new at each start.
    id: str = ""
    #: A file whose bytes all instances share, and nobody else has. ``kv_transfer_params`` that weren't made with it are
    #: refused.
    secret_file: str = ""
    #: Further options of the channel, by the names that kvferry's constructors have.
    channel_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, extra: Mapping[str, Any]) -> Options:
        """Raises ValueError for a name or a value that makes no sense."""
        known = {option.name for option in fields(cls)}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise ValueError(f"kv_connector_extra_config has {unknown[0]!r}, and may have {', '.join(sorted(known))}")
        made = cls(**{**extra, "allowed_hosts": _texts(extra.get("allowed_hosts", ()))})
        if not made.lease > 0 or not made.timeout > 0:
            raise ValueError("kv_connector_extra_config: lease and timeout are above 0")
        if made.lease > threading.TIMEOUT_MAX:
            raise ValueError(f"kv_connector_extra_config: a lease is up to {threading.TIMEOUT_MAX:.0f} seconds")
        if made.mode not in ("pull", "push"):
            raise ValueError(f"kv_connector_extra_config: mode is 'pull' or 'push', and not {made.mode!r}")
        if made.mode == "push" and made.id:
            raise ValueError("kv_connector_extra_config: with mode 'push' there is no id")
        is_guarded = made.allowed_hosts or made.secret_file or made.channel_options.get("keyring")
        if made.mode == "push" and not is_guarded:
            made = replace(made, allowed_hosts=_LOOPBACK)  # who is connected to writes
        channel_class(made.transport)
        return made

    def check_role(self, prefilling: bool, decoding: bool, data_parallel_size: int = 1) -> None:
        """Raises ValueError for a ``kv_role`` that an instance with these options can't have."""
        if self.mode != "push":
            return
        if prefilling and decoding:
            raise ValueError(
                "KvferryConnector: with mode 'push' kv_role is 'kv_producer' or 'kv_consumer', and not 'kv_both': who "
                "listens and lets others write is written to over connections that it has given up"
            )
        if prefilling and not self.port:
            raise ValueError("KvferryConnector: an instance that pushes has a port, which the router knows")
        if prefilling and data_parallel_size > 1:  # the router can't say which engine a request comes to
            raise ValueError("KvferryConnector: an instance that pushes has no data_parallel_size above 1")

    def secret(self) -> bytes:
        """What ``secret_file`` has. Raises ValueError for a short one, and for one that others may read."""
        if not self.secret_file:
            return b""
        with open(self.secret_file, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ValueError(f"secret_file {self.secret_file!r} has mode {mode:04o}, and others may read it: 0600")
            found = file.read().strip()
        if len(found) < _LEAST_SECRET:
            raise ValueError(f"secret_file {self.secret_file!r} has {len(found)} bytes, and not {_LEAST_SECRET}")
        return found

    def key_id(self, rank: int) -> str:
        """As what a worker is known by keyrings; empty if they know it by no name."""
        return f"{self.id}/{rank}" if self.id else ""


def _texts(given: Any) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(host, str) for host in given):
        raise ValueError(f"kv_connector_extra_config: allowed_hosts is a list of texts, and not {given!r}")
    return tuple(given)


def is_allowed(url: str, hosts: Iterable[str]) -> bool:
    """Whether a url's host is one of these, which are as ``Options.allowed_hosts``."""
    host = url.removeprefix("tcp://").rpartition(":")[0].removeprefix("[").removesuffix("]").lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in (allowed.lower() for allowed in hosts)
    for allowed in hosts:
        try:
            if address in ipaddress.ip_network(allowed, strict=False):
                return True
        except ValueError:  # a name
            continue
    return False


def channel_class(transport: str) -> type[kvferry.BaseTransferChannel]:
    """The channel of a transport. Raises ValueError where this package has none."""
    found = getattr(kvferry, _CHANNELS.get(transport, ""), None)
    if found is None:
        there = [name for name, kind in _CHANNELS.items() if hasattr(kvferry, kind)]
        raise ValueError(f"there is no transport {transport!r}, but {', '.join(there)}")
    chosen: type[kvferry.BaseTransferChannel] = found
    return chosen


def url_of(host: str, port: int) -> str:
    """Also of an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"


def channel_keywords(options: Options, *, listening: bool, rank: int = 0) -> dict[str, Any]:
    """What the constructor of a worker's channel is told."""
    keywords: dict[str, Any] = {"default_timeout": options.timeout, "checksums": options.checksums}
    if listening:
        port = options.port + rank if options.port else 0
        keywords["peer_init_url"] = url_of(options.host, port)
        if options.advertised_host:
            keywords["advertised_init_url"] = url_of(options.advertised_host, port)
    given = dict(options.channel_options)
    if "roads" in given:
        given["roads"] = [_road(road) for road in given["roads"]]
    return {**keywords, **given}


def _road(given: Any) -> kvferry.Road:
    """From JSON: the name of a transport, or what a ``Road`` has."""
    if isinstance(given, str):
        return kvferry.Road(given)  # type: ignore[arg-type]
    if not isinstance(given, Mapping) or "transport" not in given or set(given) - set(kvferry.Road._fields):
        raise ValueError(
            f"kv_connector_extra_config: a road is the name of a transport, or has {', '.join(kvferry.Road._fields)}; "
            f"not {given!r}"
        )
    return kvferry.Road(**given)
