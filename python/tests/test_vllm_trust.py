# SPDX-License-Identifier: Apache-2.0
"""What comes from outside and may be wrong, late or too much: kv_transfer_params, urls, layouts, and many requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kvferry.vllm import layout, worker
from kvferry.vllm.layout import HeadSource, LayoutMismatch, check_spec, plan
from kvferry.vllm.messages import Remote, Server, parts_of
from kvferry.vllm.options import Options, is_allowed
from kvferry.vllm.prompts import digest_of
from kvferry.vllm.scheduler import Load, Scheduler, Step
from vllm_sides import PROMPT, TOKENS, Blocks, Request, Side, kept_by, schedulers


def image(identifier: str, offset: int = 0) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=2))


#: What makes a request another one than ``Request`` with its defaults.
OTHERS: dict[str, dict[str, Any]] = {
    "tokens": {"prompt_token_ids": [*PROMPT[:4], 7, *PROMPT[5:]]},
    "fewer tokens": {"prompt_token_ids": PROMPT[:9], "num_prompt_tokens": 9},
    "embeddings": {"prompt_token_ids": None},
    "tokens and embeddings": {"prompt_embeds": object()},
    "adapter": {"lora_request": SimpleNamespace(lora_name="french")},
    "image": {"mm_features": [image("a cat")]},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_kept_for_another_prompt_is_computed(other: str) -> None:
    prefill, decode = schedulers()
    _, params = kept_by(prefill)
    request = Request("d", params, **OTHERS[other])
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == (0, False)
    decode.update_state_after_alloc(request, Blocks([1, 2, 3]), 0)
    decode.request_finished(request, [1, 2, 3])
    assert decode.next_step() == Step()  # nor are the other request's blocks let go


def test_the_same_prompt_is_loaded_and_may_go_on() -> None:
    prefill, decode = schedulers()
    same: dict[str, Any] = {"lora_request": SimpleNamespace(lora_name="french"), "mm_features": [image("a cat")]}
    _, params = kept_by(prefill, **same)
    request = Request("d", params, prompt_token_ids=[*PROMPT, 1, 2], num_prompt_tokens=12, **same)
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == (10, True)


def test_a_digest_tells_prompts_apart_by_what_changes_their_cache() -> None:
    def of(**changed: Any) -> str | None:
        return digest_of(Request("r", None, **changed), 10)

    digests = [
        of(), of(prompt_token_ids=[*PROMPT[:9], 2**40]), of(lora_request=SimpleNamespace(lora_name="a")),
        of(mm_features=[image("a")]), of(mm_features=[image("a", 1)]), of(mm_features=[image("a"), image("b", 4)]),
        of(mm_features=[image("b"), image("a", 4)]),
    ]  # fmt: skip
    assert None not in digests and len(set(digests)) == len(digests)
    assert of(prompt_token_ids=[*PROMPT, 5]) == of()  # the first tokens count
    assert digest_of(Request("r", None), 9) != of()
    assert of(lora_request=SimpleNamespace(lora_name="\ud800")) is not None


@pytest.mark.parametrize("embeds", [{"prompt_token_ids": None}, {"prompt_embeds": object()}], ids=["alone", "too"])
def test_prompts_that_are_embeddings_are_not_handed_over(embeds: dict[str, Any]) -> None:
    prefill, _ = schedulers()
    assert kept_by(prefill, **embeds) == (False, None)
    assert prefill.next_step() == Step(expected=["p"], forgotten=["p"])


@pytest.mark.parametrize("params", ["x", 7, [1], [], 0.5, True])
def test_parameters_that_are_no_dict_are_none(params: Any) -> None:
    """vLLM takes them from a client's vllm_xargs as they are."""
    for scheduler in schedulers():
        request = Request("d", params)
        scheduler.on_new_request(request)
        assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
        scheduler.update_state_after_alloc(request, Blocks([1, 2, 3]), 0)
        assert scheduler.request_finished(request, [1, 2, 3]) == (False, None)
        assert scheduler.next_step() == Step()


def test_caches_that_are_not_kept_whole_are_refused() -> None:
    for name in ("FullAttentionSpec", "MLAAttentionSpec"):
        check_spec(type(name, (), {})())
    for name in ("SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec", "UniformTypeKVCacheSpecs"):
        with pytest.raises(ValueError, match=f"full attention and MLA, and not {name}"):
            check_spec(type(name, (type("FullAttentionSpec", (), {}),), {})())


def test_names_in_parts() -> None:
    names = [f"cmpl-{number:032}-0-{number:08}" for number in range(5000)]
    parts = list(parts_of(names, 32 << 10))
    assert [name for part in parts for name in part] == names and 8 <= len(parts) <= 10
    assert list(parts_of(["a", "b" * 100, "c"], 20)) == [["a"], ["b" * 100], ["c"]]
    assert list(parts_of([], 20)) == []


def test_any_number_of_leases_is_renewed(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100, lease=30.0), make("decode", False, lease=0.3)
    names = [f"cmpl-{number:032}-0-{number:08}" for number in range(5000)]
    prefill.step(expected=names, granted=names)
    leases: Any = prefill.worker._leases
    renewed: set[str] = set()
    renew = leases.renew

    def counted(name: str) -> bool:
        renewed.add(name)
        return bool(renew(name))

    leases.renew = counted
    decode.step(waiting=[(name, prefill.remote(name)) for name in names])
    decode.until(lambda: len(renewed) == len(names))
    assert renewed == set(names)


def test_a_name_that_is_too_long_fails_alone(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False, lease=3.0)
    names = ["before", "x" * (1 << 20), "after"]
    leases: Any = prefill.worker._leases
    renewed: list[str] = []
    leases.renew = renewed.append
    decode.step(waiting=[(name, prefill.remote(name)) for name in names])
    decode.until(lambda: len(renewed) >= 2)
    assert renewed[:2] == ["before", "after"]


def test_text_that_cannot_be_sent_ends_its_request_alone(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    wrong = prefill.remote("\ud800")
    decode.step(loads=[Load("d", wrong, [1, 2, 3], 0, 10)], released=[("d", wrong)], waiting=[("e", wrong)])
    assert decode.loaded("d") == {1, 2, 3}
    prefill.step(expected=["p"])
    decode.step(loads=[Load("e", prefill.remote("p"), [1, 2, 3], 0, 10)])
    assert decode.loaded("e") == set()


def test_a_fault_in_a_load_fails_it_alone(make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    prefill.step(expected=["p", "q"])

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    def broken_steps(*_: Any) -> Any:
        raise RuntimeError("broken")
        yield

    for name, replacement in (("plan", broken), ("_release", broken_steps)):
        with monkeypatch.context() as patched:
            patched.setattr(worker if name == "plan" else decode.worker, name, replacement)
            loads = [Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)]
            decode.step(loads=loads, released=[("r", prefill.remote("r"))])
            assert decode.loaded("d") == {1, 2, 3}
    decode.step(loads=[Load("e", prefill.remote("q"), [1, 2, 3], 0, 10)])
    assert decode.loaded("e") == set()


def test_the_engine_goes_on_while_a_plan_is_made(make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    prefill.step(expected=["p", "q"])
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return plan(*arguments)

    monkeypatch.setattr(worker, "plan", slow)
    try:
        for name in ("p", "q"):
            decode.step(loads=[Load(name, prefill.remote(name), [1, 2, 3], 0, 10)])
        assert begun.wait(60)
        decode.step(cancelled=["q"])
        assert decode.worker.finished() == (set(), set())
    finally:
        go_on.set()
    ended: set[str] = set()

    def both() -> bool:
        ended.update(decode.worker.finished()[1])
        return ended == {"p", "q"}

    decode.until(both)
    assert decode.worker.failed_blocks() == set()


def test_closing_waits_for_the_plan_that_is_made(make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False)
    begun = threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        decode.until(lambda: decode.worker._closing)
        return plan(*arguments)

    monkeypatch.setattr(worker, "plan", slow)
    decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)])
    assert begun.wait(60)
    decode.worker.close()
    assert decode.worker.finished()[1] == {"d"} and not decode.cache.any()


def test_ranges_and_heads_that_there_are_not(make: Callable[..., Side], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make("a", False).worker._layout
    for local_first, remote_first, count in ((1, 0, 1), (0, 1, 1), (0, 0, 2), (-1, 0, 1), (0, 0, 0)):
        with pytest.raises(LayoutMismatch, match=r"heads \[-?\d, \d\) of 1 "):
            plan(ours, ours, [1], [1], 0, 4, HeadSource(0, local_first, remote_first, count))
    monkeypatch.setattr(layout, "MAX_ROWS", 5)
    with pytest.raises(LayoutMismatch, match="6 ranges for 12 tokens are more than 5"):
        plan(ours, ours, [1, 2, 3], [1, 2, 3], 0, 12, HeadSource(0, 0, 0, 1))
    assert len(plan(ours, ours, [1, 2], [1, 2], 0, 8, HeadSource(0, 0, 0, 1)).local) == 4


def test_workers_of_another_rank_than_the_parameters_say(make: Callable[..., Side]) -> None:
    """A url was left out, or two were exchanged."""
    prefill, decode = make("prefill", True, 100, tp_size=2), make("decode", False)
    prefill.step(expected=["p"])
    decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3} and not decode.cache.any()


def test_a_dead_url_of_a_living_worker_keeps_nobody_from_it(make: Callable[..., Side]) -> None:
    prefill, decode = make("prefill", True, 100), make("decode", False, timeout=5.0)
    prefill.step(expected=["p"])
    gone = make("gone", True)
    lie = prefill.remote("p", urls=(gone.worker.url,))
    gone.worker.close()
    decode.step(loads=[Load("d", lie, [1, 2, 3], 0, 10)])
    assert decode.loaded("d") == {1, 2, 3}
    decode.step(loads=[Load("e", prefill.remote("p"), [1, 2, 3], 0, 10)])
    assert decode.loaded("e") == set()


def test_hosts_that_urls_may_name() -> None:
    hosts = ("10.1.0.0/16", "fd00::/8", "Prefill-1", "192.168.0.7")
    for url in ("tcp://10.1.2.3:1", "10.1.2.3:1", "tcp://[fd00::1]:1", "tcp://prefill-1:5", "tcp://192.168.0.7:80"):
        assert is_allowed(url, hosts), url
    for url in ("tcp://10.2.0.1:1", "tcp://[fe80::1]:1", "tcp://prefill-1.evil:1", "tcp://x@prefill-1:1", "",
                "tcp://:1", "tcp://192.168.0.70:80", "tcp://[::ffff:10.1.0.1]:1"):  # fmt: skip
        assert not is_allowed(url, hosts), url


@pytest.mark.parametrize("hosts,loaded", [(["h"], True), ([], True), (["10.0.0.0/8"], False)])
def test_urls_of_other_hosts_are_not_spoken_to(hosts: list[str], loaded: bool) -> None:
    prefill = schedulers()[0]
    decode = Scheduler(Options.from_config({"allowed_hosts": hosts}), TOKENS)
    request = Request("d", kept_by(prefill)[1])
    decode.on_new_request(request)
    assert decode.get_num_new_matched_tokens(request, 0) == ((10, True) if loaded else (0, False))
    decode.request_finished(request, [])
    assert bool(decode.next_step().released) == loaded


def test_allowed_hosts_are_texts() -> None:
    for wrong in ("10.0.0.1", [7], None):
        with pytest.raises(ValueError, match="allowed_hosts is a list of texts"):
            Options.from_config({"allowed_hosts": wrong})


def test_parameters_survive_the_router() -> None:
    import json

    remote = Remote("r", ("u",), ("i",), (1, 2), 5, "d", 30.0)
    assert Remote.from_params(json.loads(json.dumps(remote.to_params()))) == remote
    assert Remote.from_params(replace(remote, lease=7).to_params()).lease == 7.0


@pytest.mark.parametrize(
    "theirs,loaded", [("sixteen bytes or more", True), ("another, also long", False), (None, False)]
)
def test_parameters_that_are_not_sealed_are_refused(tmp_path: Path, theirs: str | None, loaded: bool) -> None:
    def scheduler(name: str, secret: str | None) -> Scheduler:
        file = tmp_path / name
        file.write_text(f"{secret}\n")
        file.chmod(0o600)
        return Scheduler(Options(secret_file=str(file) if secret else ""), TOKENS)

    prefill, decode = scheduler("theirs", theirs), scheduler("ours", "sixteen bytes or more")
    prefill.set_workers({0: Server("tcp://h:1", "first", "tcp://h:1")})
    params = kept_by(prefill)[1]
    for wrong in (None, {"remote_block_ids": [5, 6, 8]}, {"remote_lease": 31.0}, {"remote_seal": 7}):
        request = Request("d", {**params, **(wrong or {})})
        decode.on_new_request(request)
        want = (10, True) if loaded and wrong is None else (0, False)
        assert decode.get_num_new_matched_tokens(request, 0) == want
        decode.request_finished(request, [])
    if theirs:  # who asks for no seal takes what has one
        without = schedulers()[1]
        request = Request("e", params)
        without.on_new_request(request)
        assert without.get_num_new_matched_tokens(request, 0) == (10, True)


def test_files_that_hold_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    for text, mode, wrong in (("x" * 15, 0o600, "has 15 bytes, and not 16"), ("x" * 40, 0o640, "has mode 0640")):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ValueError, match=wrong):
            Scheduler(Options(secret_file=str(file)), TOKENS)
    with pytest.raises(FileNotFoundError):
        Scheduler(Options(secret_file=str(tmp_path / "none")), TOKENS)


# Two pairs of keys: the first from ZeroMQ's manual, the second made for this.
KEYS = ("Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID", "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs")
OTHER_KEYS = ("X)zE?XzAU(KV(8A/kkF]HohC?>5!!=sSvdbW<P<3", "qfr:}4/}I#SFO=td2GOt[w]dE</f.G*x)f/@q*z4")


def test_each_instance_has_a_key_of_its_own(make: Callable[..., Side], tmp_path: Path) -> None:
    """And the list has more keys than a question without an addressee would try."""
    strangers = [f"{number:05}{KEYS[0][5:]} stranger-{number}" for number in range(70)]
    (tmp_path / "peers").write_text(
        "\n".join([f"{KEYS[0]} prefill-1/0", f"{OTHER_KEYS[0]} decode-3/0", *strangers]) + "\n"
    )
    for name, secret in (("prefill-1", KEYS[1]), ("decode-3", OTHER_KEYS[1])):
        (tmp_path / name).write_text(secret + "\n")
        (tmp_path / name).chmod(0o600)

    def side(key: str, called: str, *arguments: Any) -> Side:
        keyring = [str(tmp_path / key), str(tmp_path / "peers")]
        made: Side = make("engine", *arguments, id=called, channel_options={"keyring": keyring})
        return made

    prefill = side("prefill-1", "prefill-1", True, 100)
    assert prefill.worker.server.peer_id == "prefill-1/0"
    prefill.step(expected=["p", "q", "r"], granted=["p", "q", "r"])
    decode = side("decode-3", "decode-3", False)
    decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)], released=[("q", prefill.remote("q"))])
    assert decode.loaded("d") == set() and (decode.cache[:, 1] == 105).all()
    freed: set[str] = set()
    while freed != {"p", "q"}:
        freed |= prefill.freed()
    decode.worker.close()
    successor = side("decode-3", "decode-3", False)  # under the same name
    successor.step(loads=[Load("e", prefill.remote("r"), [1, 2, 3], 0, 10)])
    assert successor.loaded("e") == set() and prefill.freed() == {"r"}
    prefill.step(expected=["s"])
    impostor = side("decode-3", "prefill-1", False)
    impostor.step(loads=[Load("f", prefill.remote("s"), [1, 2, 3], 0, 10)])
    assert impostor.loaded("f") == {1, 2, 3} and not impostor.cache.any()
    with_another = prefill.remote("s", peer_ids=("decode-3/0",))  # whom the list has, and who isn't there
    successor.step(loads=[Load("g", with_another, [4, 5, 6], 0, 10)])
    assert successor.loaded("g") == {4, 5, 6}


def test_a_key_that_is_good_for_any_id(make: Callable[..., Side], tmp_path: Path) -> None:
    """Each start makes new ids, so that no other kind of key fits."""
    (tmp_path / "own").write_text(KEYS[1] + "\n")
    (tmp_path / "own").chmod(0o600)

    def side(name: str, peer: str, *arguments: Any) -> Side:
        (tmp_path / peer).write_text(f"{KEYS[0]} {'*' if peer == 'any' else peer}\n")
        keyring = [str(tmp_path / "own"), str(tmp_path / peer)]  # a list, as it comes from JSON
        made: Side = make(name, *arguments, channel_options={"keyring": keyring})
        return made

    prefill = side("prefill", "any", True, 100)
    prefill.step(expected=["p", "q", "r"], granted=["p", "q", "r"])
    decode = side("decode", "any", False)
    decode.step(loads=[Load("d", prefill.remote("p"), [1, 2, 3], 0, 10)], released=[("q", prefill.remote("q"))])
    assert decode.loaded("d") == set() and (decode.cache[:, 1] == 105).all()
    freed: set[str] = set()
    while freed != {"p", "q"}:
        freed |= prefill.freed()
    for stranger in (side("decode", "decode-3", False), make("decode", False, timeout=2.0)):
        stranger.step(loads=[Load("e", prefill.remote("r"), [1, 2, 3], 0, 10)])
        assert stranger.loaded("e") == {1, 2, 3} and not stranger.cache.any()
