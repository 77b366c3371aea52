"""The DHCPv4 client: gets a lease for one interface and keeps it (RFC 2131, 4.4).

A guard and a worker: the guard does nothing but start the worker again when it has died. Times are
measured on CLOCK_BOOTTIME, which no step of the wall clock moves. The address's lifetime in the
kernel is the lease's: without the client it goes away by itself.
"""

import _socket
import os
import time

from microguest.init_shim import tracers
from microguest.init_shim.failure import Failure
from microguest.init_shim.network import dhcp_packets, etcfiles
from microguest.init_shim.network.addresses import Prefix, text_address
from microguest.init_shim.network.dhcp import Order
from microguest.init_shim.network.dhcp_packets import (
    ACK,
    DISCOVER,
    FOREVER,
    NAK,
    OFFER,
    REQUEST,
    Reply,
)
from microguest.init_shim.network.dhcp_sockets import Everybody, OneServer
from microguest.init_shim.network.netlink import FROM_DHCP, Link, Netlink
from microguest.init_shim.reporter import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType
else:
    import _signal as signal

__all__ = ["run"]

FIRST_WAIT = 1.0  # seconds for an answer; doubled with each try. The RFC's 4 are half of our boot
LONGEST_WAIT = 64.0
JITTER = 0.25  # of the wait, up or down, so that a hundred clones do not ask as one
RENEW_AGAIN = 60.0  # seconds at least between two questions about a lease (RFC 2131, 4.4.5)
RESTART_WAIT = 1.0  # seconds before a dead worker is started again; doubled with each
REQUESTS = 4  # for one offer, before looking for another


class RenewNow(Exception):
    """SIGUSR1: somebody thinks that the lease should be looked at."""


def run(document: str) -> int:
    """Be the guard of a worker for the Order in `document`. Does not return."""
    order = Order.from_json(document)
    name_process()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is for the worker, of the same name
    wait = RESTART_WAIT
    while True:
        began = now()
        pid = os.fork()
        if pid == 0:
            work(order)
        be_silent()  # only the first worker is waited for
        how = describe(tracers.await_end(pid))
        say(f"the DHCP client of {order.interface} ended ({how}); starting another")
        time.sleep(wait)
        reap_earlier()
        lived = now() - began
        wait = RESTART_WAIT if lived > LONGEST_WAIT else min(2 * wait, LONGEST_WAIT)


def name_process() -> None:
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("dhcp")
    except OSError:
        pass  # only for people


def reap_earlier() -> None:
    """Workers that a debugger has let go since."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass  # there is none


def describe(status: int | None) -> str:
    if status is None:
        return "a debugger keeps how"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.WEXITSTATUS(status)}"


def work(order: Order) -> None:
    """In the worker: never returns."""
    try:
        client = Client(order)
        while True:
            client.keep(client.acquire())
    except Failure as failure:
        say(f"DHCP on {order.interface}: {failure.message}")
        tell(failure.message)
    except BaseException as error:  # noqa: BLE001  the guard must not run on as two
        say(f"DHCP on {order.interface}: unexpected: {error!r:.500}")
    finally:
        os._exit(1)


def tell(line: str) -> None:
    """Answer who started the client; the first answer is the only one."""
    try:
        os.write(1, f"{line}\n".encode()[:512])
    except OSError:
        pass  # nobody waits any more
    be_silent()


def be_silent() -> None:
    """Nobody hears what is written from now on."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


class Client:
    """One interface's lease."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.netlink = Netlink()
        found = [link for link in self.netlink.links() if link.name == order.interface]
        if not found or len(found[0].mac) != 17:
            raise Failure(f"{order.interface} is not an Ethernet interface")
        self.link: Link = found[0]
        self.mac = bytes.fromhex(self.link.mac.replace(":", ""))
        self.began = now()
        self._waiting = False
        self._renew_asked = False
        signal.signal(signal.SIGUSR1, self._note)

    # ── getting one ──────────────────────────────────────────────────────────────────────────────

    def acquire(self) -> "Lease":
        """Until a server grants a lease: that may take for ever."""
        self.began = now()
        wait = FIRST_WAIT
        with Everybody(self.link) as sockets:
            while True:
                transaction = random(32)
                sockets.send(self.message(DISCOVER, transaction))
                offer = self.answer(sockets, transaction, (OFFER,), jittered(wait))
                if offer is not None:
                    lease = self.request(sockets, transaction, offer)
                    if lease is not None:
                        return lease
                wait = min(2 * wait, LONGEST_WAIT)

    def request(self, sockets: "Everybody", transaction: int, offer: Reply) -> "Lease | None":
        """Take an offer; None if it is refused or forgotten about."""
        wait = FIRST_WAIT
        for _ in range(REQUESTS):
            asked = now()
            sockets.send(
                self.message(REQUEST, transaction, wanted=offer.address, server=offer.server)
            )
            reply = self.answer(sockets, transaction, (ACK, NAK), jittered(wait), offer.server)
            if reply is not None:
                return None if reply.kind == NAK else Lease(reply, asked)
            wait = min(2 * wait, LONGEST_WAIT)
        return None

    # ── keeping it ───────────────────────────────────────────────────────────────────────────────

    def keep(self, lease: "Lease") -> None:
        """Use a lease and renew it; returns when it is lost, and not used any more."""
        self.apply(lease, None)
        tell(f"bound {lease.prefix}")
        while True:
            self.sleep_until(lease.renew_at)
            renewed = self.renew(lease)
            if renewed is None:
                self.drop(lease)
                say(f"{self.link.name} lost its DHCP lease of {lease.prefix}")
                return
            self.apply(renewed, lease)
            lease = renewed

    def renew(self, lease: "Lease") -> "Lease | None":
        """Ask the server that gave it, then any; None when it is refused or over."""
        while now() < lease.ends_at:
            phase_ends = lease.rebind_at if now() < lease.rebind_at else lease.ends_at
            again = max((phase_ends - now()) / 2, RENEW_AGAIN)
            until = min(now() + again, phase_ends)
            transaction = random(32)
            asked = now()
            own = lease.prefix.address
            try:
                if phase_ends == lease.rebind_at and now() < lease.rebind_at:
                    sockets: Everybody | OneServer = OneServer(self.link, own, lease.reply.server)
                else:
                    sockets = Everybody(self.link, own)
                with sockets:
                    sockets.send(self.message(REQUEST, transaction, own=own))
                    reply = self.answer(sockets, transaction, (ACK, NAK), until - now())
            except Failure as failure:
                say(f"DHCP on {self.link.name}: {failure.message}")
                reply = None
                time.sleep(max(0.0, until - now()))
            if reply is not None:
                return None if reply.kind == NAK else Lease(reply, asked)
        return None

    # ── using it ─────────────────────────────────────────────────────────────────────────────────

    def apply(self, lease: "Lease", before: "Lease | None") -> None:
        """Address, routes, MTU, name servers; what only the lease before had is taken away."""
        reply = lease.reply
        if before is not None and str(before.prefix) != str(lease.prefix):
            self.drop(before)
            before = None
        self.netlink.set_address(self.link, lease.prefix, lease.seconds_left())
        if self.order.mtu and reply.mtu:
            self.netlink.set_mtu(self.link, reply.mtu)
        if before is None or before.reply.routes != reply.routes:
            if before is not None:
                self.drop_routes(before)
            # Those without a gateway first: the others' gateways may be behind them.
            for destination, length, gateway in sorted(reply.routes, key=lambda route: route[2]):
                via = gateway if gateway != bytes(4) else b""
                self.netlink.set_route(
                    self.link,
                    Prefix(_socket.AF_INET, destination, length),
                    via,
                    source=reply.address,
                    on_link=bool(via) and not lease.prefix.has(via),
                    origin=FROM_DHCP,
                )
        names = (reply.nameservers, reply.domain)
        if before is None or names != (before.reply.nameservers, before.reply.domain):
            self.write_names(reply)

    def write_names(self, reply: Reply) -> None:
        if not self.order.resolv_conf or not reply.nameservers:
            return
        servers = [text_address(server) for server in reply.nameservers]
        search = self.order.search or tuple(filter(None, (reply.domain,)))
        text = etcfiles.resolv_conf_text(servers, search, self.order.options)
        etcfiles.write("resolv.conf", text)

    def drop(self, lease: "Lease") -> None:
        """Stop using an address that is not ours any more."""
        self.drop_routes(lease)
        self.netlink.remove_address(self.link, lease.prefix)

    def drop_routes(self, lease: "Lease") -> None:
        for destination, length, gateway in lease.reply.routes:
            to = Prefix(_socket.AF_INET, destination, length)
            via = gateway if gateway != bytes(4) else b""
            self.netlink.remove_route(self.link, to, via, origin=FROM_DHCP)

    # ── the exchange ─────────────────────────────────────────────────────────────────────────────

    def message(
        self,
        kind: int,
        transaction: int,
        *,
        own: bytes = bytes(4),
        wanted: bytes = b"",
        server: bytes = b"",
    ) -> bytes:
        return dhcp_packets.message(
            kind,
            transaction,
            self.mac,
            seconds=int(now() - self.began),
            hostname=self.order.hostname,
            own=own,
            wanted=wanted,
            server=server,
        )

    def answer(
        self,
        sockets: "Everybody | OneServer",
        transaction: int,
        kinds: tuple[int, ...],
        wait: float,
        server: bytes = b"",
    ) -> Reply | None:
        """The first answer of one of `kinds`, from `server` if that is given; None in time."""
        until = now() + wait
        while (left := until - now()) > 0:
            payload = sockets.receive(left)
            if payload is None:
                continue
            reply = dhcp_packets.parse_message(payload, transaction, self.mac)
            if reply and reply.kind in kinds and server in (b"", reply.server):
                return reply
        return None

    def sleep_until(self, moment: float) -> None:
        """Also until SIGUSR1. In pieces: the clock that poll(2) counts on stops in suspend."""
        try:
            self._waiting = True
            while not self._renew_asked and now() < moment:
                time.sleep(min(max(0.0, moment - now()), RENEW_AGAIN))
        except RenewNow:
            pass
        finally:
            self._waiting = self._renew_asked = False

    def _note(self, number: int, frame: "FrameType | None") -> None:
        self._renew_asked = True
        if self._waiting:
            self._waiting = False
            raise RenewNow


class Lease:
    """A server's ACK with its moments on CLOCK_BOOTTIME, counted from when it was asked for."""

    def __init__(self, reply: Reply, asked: float) -> None:
        self.reply = reply
        self.prefix = Prefix(_socket.AF_INET, reply.address, reply.length)
        endless = reply.lease == FOREVER
        self.renew_at = float("inf") if endless else asked + reply.renewal
        self.rebind_at = float("inf") if endless else asked + reply.rebinding
        self.ends_at = float("inf") if endless else asked + reply.lease

    def seconds_left(self) -> int:
        """For the kernel."""
        if self.reply.lease == FOREVER:
            return FOREVER
        return max(1, int(self.ends_at - now()))


def now() -> float:
    """Seconds since the boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def random(bits: int) -> int:
    return int.from_bytes(os.urandom(bits // 8), "big")


def jittered(wait: float) -> float:
    return wait * (1 + JITTER * (random(16) / 0x8000 - 1))
