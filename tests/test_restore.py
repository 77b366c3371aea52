"""The operations `clock` and `renew`: an agent in namespaces of its own, and hosts against scripts.

The agent shares this machine's kernel. So nothing here sets a clock or seeds random numbers: that
it refuses to is tested; that it works is tested in virtual machines. Its host name and network are
those of new namespaces, its root is a folder.
"""

import asyncio
import ctypes
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from agentharness import AgentProcess, Host, Refused
from hostkit import TOKEN, Peer, agent_at, serving
from init_machine import make_root

from microguest import aio
from microguest.agent.system.generation import announces
from microguest.guest import bounds
from microguest.guest.boot.network import Interface, Route
from microguest.guest.errors import OperationError, RemoteProtocolError
from microguest.guest.record import Record, RecordError
from microguest.guest.wire.connection import Request, Response
from microguest.guest.wire.messages import FEATURES, Hello, PingResult, Welcome
from microguest.guest.wire.renewal import Clock, ClockResult, Renew, Renewed
from microguest.host_client.client.clock import is_out

R = TypeVar("R", bound=Record)
MAC = "52:54:00:12:34:56"
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
SECOND = 10**9
HERE = os.uname().nodename


# ── what is refused before anything is done ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {"realtime": 1},
        {"boottime": 1},
        {"realtime": -1, "boottime": 1},
        {"realtime": 1, "boottime": bounds.NANOSECONDS_MAX},
    ],
)
def test_half_a_clock_is_refused(fields: dict[str, int]) -> None:
    for record in (Clock, Renew):
        with pytest.raises(RecordError, match=r"realtime|boottime"):
            record.from_map(fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", bytes(bounds.SEED + 1)),
        ("hostname", ""),
        ("hostname", "a" * 65),
        ("hostname", "-a"),
        ("hostname", "a b"),
        ("hostname", "a\nb"),
        ("hostname", "é"),
        ("machine_id", ""),
        ("machine_id", "0" * 32),
        ("machine_id", "A" * 32),
        ("machine_id", "a" * 31),
        ("machine_id", "../../etc/passwd"),
        ("interfaces", [{"name": "eth0", "dhcp": True}]),
        ("interfaces", [{"name": "eth0"}] * (bounds.INTERFACES + 1)),
    ],
)
def test_bad_wish_is_refused(field: str, value: object) -> None:
    with pytest.raises(RecordError, match=field):
        Renew.from_map({field: value})


# ── the agent ────────────────────────────────────────────────────────────────────────────────────


def unshare() -> None:
    """For the child only: host name and network of its own, with a card that is plugged in."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS | CLONE_NEWNET):
        os._exit(99)  # never with the machine's own
    card = f"ip link add card address {MAC} type veth peer name far"
    if os.system(f"{card} && ip link set far up && ip link set lo up"):
        os._exit(98)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "root")


@pytest.fixture
def agent(root: Path) -> Iterator[AgentProcess]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (root / "proc").mkdir()
    (root / "sys").mkdir()
    with AgentProcess(root=str(root), prepare=unshare) as process:
        yield process


def renew(agent: AgentProcess, **fields: Any) -> Renewed:
    with Host(agent) as host:
        renewed = host.request("renew", Renew(**fields))
    assert isinstance(renewed, Renewed)
    return renewed


def said(agent: AgentProcess, *argv: str) -> str:
    with Host(agent) as host:
        host.start(*argv)
        return host.collect().stdout.decode()


def test_clock_of_a_shared_kernel_is_told_and_never_set(agent: AgentProcess) -> None:
    with Host(agent) as host:
        before = time.time_ns()
        told = host.request("clock", Clock())
        assert isinstance(told, ClockResult)
        assert before <= told.realtime <= time.time_ns()
        assert abs(told.boottime - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < 10 * SECOND
        assert (told.stepped, told.pauses) == (0.0, 0)
        with pytest.raises(Refused) as caught:
            host.request("clock", Clock(realtime=told.realtime, boottime=told.boottime))
        assert caught.value.failure.code == "kernel_shared"
    renewed = renew(agent, realtime=told.realtime, boottime=told.boottime, seed=b"x" * 16)
    assert renewed.failed.keys() == {"clock", "random"}
    assert (renewed.stepped, renewed.seeded, renewed.reseeded) == (None, False, False)


def test_welcome_has_no_clock_that_could_not_be_set(agent: AgentProcess) -> None:
    with Host(agent, hello=False) as host:
        host.send(Hello(token="correct horse battery staple", clock=True))
        (welcome,) = host.connection.receive(host.sock.recv(4096))
        assert isinstance(welcome, Welcome)
        assert welcome.clock == ()
        assert "renew" in welcome.features


def test_identity(agent: AgentProcess, root: Path) -> None:
    (root / "etc" / "hostname").write_text("old\n")
    (root / "var" / "lib" / "dbus").mkdir(parents=True)
    (root / "var" / "lib" / "dbus" / "machine-id").write_text("0" * 32 + "\n")
    given = "0123456789abcdef" * 2
    renewed = renew(agent, hostname="new.example", machine_id=given)
    assert renewed == Renewed(hostname="new.example", machine_id=given)
    assert said(agent, "hostname") == "new.example\n"
    assert (root / "etc" / "hostname").read_text() == "new.example\n"
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        assert (root / name).read_text() == f"{given}\n"
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o444
    assert os.uname().nodename == HERE
    made = {renew(agent, machine_id="random").machine_id for _ in range(3)}
    assert len(made) == 3
    assert (root / "etc" / "machine-id").read_text().strip() in made
    assert not [name for name in os.listdir(root / "etc") if name.startswith(".")]


def test_identity_stays_in_the_root(agent: AgentProcess, root: Path, tmp_path: Path) -> None:
    """A link in place of the file is replaced; one in place of its folder ends in the root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "machine-id").write_text("untouched\n")
    (root / "etc" / "machine-id").symlink_to(outside / "machine-id")
    (root / "etc" / "hostname").symlink_to(outside / "hostname")
    assert not renew(agent, machine_id="random", hostname="other").failed
    assert not (root / "etc" / "machine-id").is_symlink()
    (root / "etc").rename(root / "etc-of-old")
    (root / "etc").symlink_to(f"../../../..{outside}")
    failed = renew(agent, machine_id="random").failed
    assert failed.keys() == {"machine_id"}
    assert "No such file" in failed["machine_id"]
    assert (outside / "machine-id").read_text() == "untouched\n"
    assert sorted(os.listdir(outside)) == ["machine-id"]


def test_parts_that_fail_leave_the_others(agent: AgentProcess, root: Path) -> None:
    (root / "etc" / "machine-id").mkdir()
    (root / "etc" / "machine-id" / "full").write_text("")
    renewed = renew(agent, machine_id="random", hostname="other", seed=b"1")
    assert renewed.failed.keys() == {"machine_id", "random"}
    assert renewed.hostname == "other"
    assert not [name for name in os.listdir(root / "etc") if name.startswith(".")]


def test_interfaces_get_new_addresses_and_lose_the_old(agent: AgentProcess) -> None:
    first = Interface(
        name="card",
        addresses=("10.1.0.5/24", "10.1.0.6/24", "fd00:1::5/64"),
        routes=(Route(via="10.1.0.1"), Route(to="10.2.0.0/16", via="10.1.0.2", metric=7)),
        mtu=1400,
    )
    assert renew(agent, interfaces=(first,)) == Renewed(interfaces=("card",))
    shown = said(agent, "ip", "addr", "show", "card")
    assert "mtu 1400" in shown
    for address in first.addresses:
        assert f" {address} " in shown
    routes = said(agent, "ip", "route")
    assert "default via 10.1.0.1 dev card" in routes
    assert "10.2.0.0/16 via 10.1.0.2 dev card  metric 7" in routes
    # The old primary address goes, and with it the kernel removes the others of its network.
    second = Interface(
        name="net0",
        mac=MAC.upper(),
        addresses=("10.1.0.6/24", "fd00:2::5/64"),
        routes=(Route(via="10.1.0.9"), Route(to="fd00:9::/32", via="fd00:2::1")),
    )
    for _ in range(2):  # the second time nothing is left to do
        renewed = renew(agent, interfaces=(second,))
        assert not renewed.failed
        shown = said(agent, "ip", "addr", "show", "card")
        assert " 10.1.0.6/24 " in shown
        assert " fd00:2::5/64 " in shown
        assert " fe80::" in shown
        for gone in ("10.1.0.5", "fd00:1::5"):
            assert gone not in shown
        assert said(agent, "ip", "route").count("via") == 1
        assert "default via 10.1.0.9" in said(agent, "ip", "route")
        assert "fd00:9::/32 via fd00:2::1" in said(agent, "ip", "-6", "route")
    assert "127.0.0.1/8" in said(agent, "ip", "addr", "show", "lo")  # which was not asked for


@pytest.mark.parametrize(
    ("interface", "reason"),
    [
        (Interface(name="eth9", addresses=("10.0.0.1/8",)), "no such interface"),
        (Interface(name="eth9", mac="52:54:00:00:00:01"), "no such interface"),
        (Interface(name="lo", addresses=("10.0.0.1",)), "not an address with a prefix"),
        (Interface(name="lo", addresses=("10.0.0.1/33",)), "not an address with a prefix"),
        (Interface(name="lo", addresses=("10.0.0/8",)), "not an address"),
        (Interface(name="lo", routes=(Route(via="10.200.0.1"),)), "unreachable"),
    ],
)
def test_bad_interface_is_named(agent: AgentProcess, interface: Interface, reason: str) -> None:
    renewed = renew(agent, interfaces=(interface, Interface(name="lo", addresses=("10.0.0.1/8",))))
    assert renewed.interfaces == ("lo",)
    assert reason in renewed.failed["network"]
    assert interface.name in renewed.failed["network"]


@pytest.mark.parametrize(
    ("message", "sender", "expected"),
    [
        (
            b"change@/devices/platform/QEMUVGID:00\0ACTION=change\0NEW_VMGENID=1\0SEQNUM=7\0",
            0,
            True,
        ),
        (
            b"change@/devices/platform/QEMUVGID:00\0ACTION=change\0NEW_VMGENID=1\0SEQNUM=7\0",
            77,
            False,
        ),
        (b"change@/devices/pnp0/00:03\0ACTION=change\0SYNTH_ARG_NEW_VMGENID=1\0", 0, False),
        (b"add@/devices/NEW_VMGENID=1/x\0ACTION=add\0", 0, False),
        (b"", 0, False),
    ],
)
def test_only_the_kernel_tells_of_a_new_generation(
    message: bytes, sender: int, expected: bool
) -> None:
    assert announces(message, sender) is expected


# ── the host ─────────────────────────────────────────────────────────────────────────────────────


def welcome_at(realtime: int) -> Welcome:
    return Welcome(agent="test", features=FEATURES, clock=(realtime, 5 * SECOND))


@pytest.mark.parametrize(
    ("ahead", "took", "expected"),
    [
        (0.0, 0.01, False),
        (0.3, 0.01, True),
        (-0.3, 0.01, True),
        (-7200.0, 0.01, True),
        (0.3, 1.0, None),  # it may have been read at any moment of that second
        (0.0, 1.0, None),
        (0.09, 0.1, None),
        (-5.0, 1.0, True),
    ],
)
def test_only_what_is_certain_counts(ahead: float, took: float, expected: bool | None) -> None:
    middle = time.time_ns() - int(took * SECOND / 2)
    began = time.monotonic_ns() - int(took * SECOND)
    assert is_out(welcome_at(middle + int(ahead * SECOND)), began) is expected


def test_guest_without_a_clock_of_its_own_is_left_alone() -> None:
    assert is_out(Welcome(agent="test"), time.monotonic_ns()) is None


class Guest:
    """A guest whose clock is `ahead` seconds off, and which notes what is asked of it."""

    def __init__(self, ahead: float, *, refuses: bool = False) -> None:
        self.ahead = int(ahead * SECOND)
        self.refuses = refuses
        self.hellos: list[Hello] = []
        self.asked: list[Request] = []

    def __call__(self, peer: Peer) -> None:
        hello = peer.next()
        assert isinstance(hello, Hello)
        assert hello.token == TOKEN
        self.hellos.append(hello)
        clock = (time.time_ns() + self.ahead, self.boottime) if hello.clock else ()
        peer.send(Welcome(agent="test", features=FEATURES, clock=clock))
        while True:
            request = peer.next()
            assert isinstance(request, Request)
            self.asked.append(request)
            peer.send(Response(result=self.answer(request)))

    @property
    def boottime(self) -> int:
        return time.monotonic_ns()

    def answer(self, request: Request) -> PingResult | ClockResult:
        args = request.args
        if not isinstance(args, Clock):
            return PingResult(uptime=1.0, root_ready=True)
        stepped = 0
        if args.realtime is not None and args.boottime is not None:
            boottime, now = self.boottime, time.time_ns()
            stepped = args.realtime + boottime - args.boottime - now - self.ahead
            self.ahead += stepped
        now = time.time_ns()
        return ClockResult(
            realtime=now + self.ahead, boottime=self.boottime, stepped=stepped / SECOND
        )


def test_clock_that_is_out_is_set_on_connecting(tmp_path: Path) -> None:
    guest = Guest(-3600.25)
    with serving(tmp_path / "s", guest), agent_at(tmp_path / "s") as agent:
        agent.ping()
        assert abs(guest.ahead) < SECOND
        assert [hello.clock for hello in guest.hellos] == [True]
        assert guest.asked[0].op == "ping"
        assert sum(request.args != Clock() for request in guest.asked[1:]) == 1
        asked = len(guest.asked)
        agent.ping()  # it is not asked again at once
        assert len(guest.asked) == asked + 1


def test_clock_that_is_right_costs_nothing(tmp_path: Path) -> None:
    guest = Guest(0.0)
    with serving(tmp_path / "s", guest), agent_at(tmp_path / "s") as agent:
        agent.ping()
        assert [request.op for request in guest.asked] == ["ping"]


def test_guest_that_does_not_tell_is_not_asked_again_at_once(tmp_path: Path) -> None:
    asked = []

    def script(peer: Peer) -> None:
        hello = peer.next()
        assert isinstance(hello, Hello)
        asked.append(hello.clock)
        peer.send(Welcome(agent="test", features=FEATURES))
        peer.next()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))

    with serving(tmp_path / "s", script, script), agent_at(tmp_path / "s") as agent:
        agent.close()  # it keeps no connection
        agent.ping()
        agent.ping()
    assert asked == [True, False]


def test_clock_is_left_alone_on_request(tmp_path: Path) -> None:
    guest = Guest(-3600.0)
    with serving(tmp_path / "s", guest), agent_at(tmp_path / "s") as agent:
        agent.driver.keeps_clock = False
        agent.ping()
        assert [hello.clock for hello in guest.hellos] == [False]
        found = agent.clock()
        assert found.offset == pytest.approx(-3600.0, abs=found.error + 0.01)
        assert agent.step_clock(beyond=3601.0).stepped == 0.0
        assert agent.step_clock(beyond=3599.0).stepped == pytest.approx(3600.0, abs=1.0)
        assert abs(agent.clock().offset) < 1.0


def test_only_network_failed_raises_where_asked(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(Response(result=Renewed(seeded=True, failed={"network": "eth0: no"})))

    path = tmp_path / "s"
    with serving(path, script, script), agent_at(path) as agent:
        assert agent.renew(clock=False).failed == {"network": "eth0: no"}
        with pytest.raises(OperationError, match="network: eth0: no") as caught:
            agent.renew(clock=False, check=True)
        assert caught.value.code == "not_renewed"


def test_the_same_for_asyncio(tmp_path: Path) -> None:
    guest = Guest(-7.0)

    async def ask() -> None:
        agent = await aio.connect(f"unix://{tmp_path / 's'}", token=TOKEN, step_clock=False)
        async with agent:
            assert (await agent.clock()).offset == pytest.approx(-7.0, abs=1.0)
            assert (await agent.step_clock()).stepped == pytest.approx(7.0, abs=1.0)

    with serving(tmp_path / "s", guest):
        asyncio.run(ask())


ABSURD = [
    (-(2**63), 2**63 - 1),
    (-1, 5),
    (5, -1),
    (5, bounds.NANOSECONDS_MAX),
    (2**63 - 1, 2**63 - 1),
]  # fmt: skip


def unchecked(kind: type[R], **fields: object) -> R:
    """A record as only a hostile agent makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "check", lambda self: None)
        return kind(**fields)


@pytest.mark.parametrize(("realtime", "boottime"), ABSURD)
def test_a_welcome_with_a_clock_that_no_guest_has(realtime: int, boottime: int) -> None:
    with pytest.raises(RecordError, match=r"realtime|boottime"):
        Welcome.from_map({"agent": "test", "clock": [realtime, boottime]})
    with pytest.raises(RecordError, match=r"realtime|boottime"):
        ClockResult.from_map({"realtime": realtime, "boottime": boottime})


@pytest.mark.parametrize(("realtime", "boottime"), ABSURD)
def test_a_clock_that_no_guest_has_fails_nothing_but_its_setting(
    tmp_path: Path, realtime: int, boottime: int
) -> None:
    reading = unchecked(ClockResult, realtime=realtime, boottime=boottime)

    def lies(peer: Peer) -> None:
        while True:
            peer.next()
            peer.send(Response(result=reading))

    def script(peer: Peer) -> None:
        peer.next()
        peer.send(welcome_at(SECOND))
        peer.next()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
        lies(peer)

    def asked(peer: Peer) -> None:
        peer.greet(FEATURES)
        peer.send(Response(result=reading))
        lies(peer)

    path = tmp_path / "s"
    with serving(path, script, asked), agent_at(path) as agent:
        assert agent.ping().root_ready
        with pytest.raises(RemoteProtocolError):
            agent.step_clock()


def test_a_clock_that_is_centuries_ahead_is_set(tmp_path: Path) -> None:
    guest = Guest(200 * 365 * 86400.0)
    with serving(tmp_path / "s", guest), agent_at(tmp_path / "s") as agent:
        agent.ping()
        assert abs(guest.ahead) < SECOND
