# SPDX-License-Identifier: Apache-2.0
"""The options of C++ are those of Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kvferry
import pytest
from kvferry._options import AutoOptions, ChannelOptions, RdmaOptions, ShmOptions, TcpOptions

HEADERS = Path(__file__).parents[2] / "include" / "kvferry"

#: What Python has another way for, or can't have: an executor, a context of ZeroMQ, a channel that others are roads of.
ELSEWHERE = {"regions", "hold_side_messages", "executor", "log_sink", "log_level", "zmq_context", "road_of"}


def names_of(header: str, struct: str) -> set[str]:
    text = (HEADERS / header).read_text()
    found = re.search(rf"^struct {struct}\b.*?\{{\n(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    assert found
    members = re.findall(r"^  (?!///)[\w:<> ]+?[ *](\w+)(?: = [^;]*|\{[^;]*\})?;", found[1], re.MULTILINE)
    return set(members) - ELSEWHERE


def renamed(names: set[str]) -> set[str]:
    return {"poll_spin" if name == "poll" else name for name in names}


def test_every_option_is_there() -> None:
    common = renamed(names_of("channel_options.hpp", "ChannelOptions"))
    assert set(ChannelOptions.__annotations__) == common
    assert set(TcpOptions.__annotations__) == common | names_of("tcp_transfer_channel.hpp", "TcpOptions")
    assert set(ShmOptions.__annotations__) == common | names_of("shm_transfer_channel.hpp", "ShmOptions")
    assert set(AutoOptions.__annotations__) == common | names_of("auto_transfer_channel.hpp", "AutoOptions")
    assert set(RdmaOptions.__annotations__) == common | names_of("rdma_transfer_channel.hpp", "RdmaOptions")


def test_every_option_is_taken() -> None:
    kvferry.TcpTransferChannel(**dict.fromkeys(TcpOptions.__annotations__)).close()  # type: ignore[arg-type]
    kvferry.ShmTransferChannel(**dict.fromkeys(ShmOptions.__annotations__)).close()  # type: ignore[arg-type]
    kvferry.AutoTransferChannel(**dict.fromkeys(AutoOptions.__annotations__)).close()  # type: ignore[arg-type]
    with pytest.raises(kvferry.TransferError):
        # No device, or no library; on a host with one, the address is nobody's.
        kvferry.RdmaTransferChannel(
            **{**dict.fromkeys(RdmaOptions.__annotations__), "peer_init_url": "nonsense://"}  # type: ignore[arg-type]
        )


def test_a_keyring_is_read_from_its_files(tmp_path: Path) -> None:
    with pytest.raises(kvferry.TransferError, match="key file"):
        kvferry.TcpTransferChannel(keyring=(str(tmp_path / "key"), str(tmp_path / "peers")))
    (tmp_path / "key").write_text("no key")
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(kvferry.TransferError, match="is no key"):
        kvferry.TcpTransferChannel(keyring=(str(tmp_path / "key"), str(tmp_path / "peers")))


def test_encryption_is_chosen_by_its_name() -> None:
    kvferry.TcpTransferChannel(encryption="off").close()
    with pytest.raises(ValueError, match="'sometimes'"):
        kvferry.TcpTransferChannel(encryption="sometimes")  # type: ignore[arg-type]
    with pytest.raises(kvferry.TransferError, match="no ChannelOptions::keyring"):
        kvferry.TcpTransferChannel(encryption="required")


def certificate(folder: Path, name: str, ca: str) -> tuple[str, str, str]:
    """As docs/security.md has it."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    by = ["-keyout", f"{folder}/{ca}.key", "-out", f"{folder}/{ca}.pem"]
    if not (folder / f"{ca}.pem").exists():
        openssl("req", "-x509", *kind, "-days", "2", "-subj", f"/CN={ca}", "-addext", "keyUsage=critical,keyCertSign", *by)
    openssl(
        *("req", "-x509", "-CA", f"{folder}/{ca}.pem", "-CAkey", f"{folder}/{ca}.key", *kind, "-days", "1"),
        *("-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:FALSE"),
        *("-addext", "keyUsage=critical,digitalSignature", "-addext", "extendedKeyUsage=clientAuth,serverAuth"),
        *("-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"),
    )
    return f"{folder}/{name}.pem", f"{folder}/{name}.key", f"{folder}/{ca}.pem"


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates by the openssl command")
def test_pages_are_encrypted_by_certificates(tmp_path: Path) -> None:
    public, secret = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"
    (tmp_path / "key").write_text(secret + "\n")
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "peers").write_text(f"{public} *\n")
    keyring = (str(tmp_path / "key"), str(tmp_path / "peers"))
    source, target = bytearray(b"x" * 4096), bytearray(4096)
    with (
        kvferry.TcpTransferChannel(
            regions=[kvferry.Region(target, 4096)],
            peer_init_url="tcp://127.0.0.1:0",
            keyring=keyring,
            certificates=certificate(tmp_path, "far", "ca"),
        ) as far,
        kvferry.TcpTransferChannel(keyring=keyring, certificates=certificate(tmp_path, "near", "ca")) as near,
        kvferry.TcpTransferChannel(keyring=keyring, certificates=certificate(tmp_path, "other", "ca 2")) as other,
    ):
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)
        info = near.peer_info("far")
        assert info is not None and "with certificates" in info.path
        assert near.batched_write([source], "far", remote_indexes=[0]) == 1
        with pytest.raises(kvferry.TransferError, match="certificates.trusted doesn't vouch"):
            other.lazy_init_peer_connection("other", "far", far.peer_init_url)
    assert target == source


def test_certificates_are_read_from_their_files(tmp_path: Path) -> None:
    with pytest.raises(kvferry.TransferError, match="no ChannelOptions::keyring"):
        kvferry.TcpTransferChannel(certificates=("chain", "key", "ca"))
    with pytest.raises(TypeError):
        kvferry.TcpTransferChannel(certificates=("chain", "key"))  # type: ignore[arg-type]


@pytest.mark.parametrize("of_channel", [None, False, True])
@pytest.mark.parametrize("kind", ["write", "read"])
def test_checksums_are_asked_for_by_channel_and_by_call(of_channel: bool | None, kind: str) -> None:
    """They are seen by what goes through the sockets. A call's word counts, if it has one."""
    own, peers = bytearray(b"x" * 4096), bytearray(4096)
    options: Any = {} if of_channel is None else {"checksums": of_channel}
    with (
        kvferry.TcpTransferChannel(regions=[kvferry.Region(peers, 4096)], peer_init_url="tcp://127.0.0.1:0") as far,
        kvferry.TcpTransferChannel(**options) as near,
    ):
        near.lazy_init_peer_connection("near", "far", far.peer_init_url)

        def bytes_of(**spec: Any) -> int:
            def count() -> int:
                paths = near.stats()["paths"]
                return sum(path["bytes_out" if kind == "write" else "bytes_in"] for path in paths)

            before = count()
            move = near.batched_write if kind == "write" else near.batched_read
            assert move([own], "far", remote_indexes=[0], **spec) == 1
            return count() - before

        without, with_checksums = bytes_of(checksums=False), bytes_of(checksums=True)
        assert without < with_checksums
        assert bytes_of() == (with_checksums if of_channel else without)
    assert peers == own
