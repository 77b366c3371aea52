"""A Debian root on every kind of machine: real programs, and hostile ones that dial the agent."""

import contextlib
import errno
import hashlib
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import imagefactory
import machinekit
import pytest
from patience import PATIENCE

from microguest import Machine, boot, connect
from microguest.guest.errors import OperationError

PROJECT = Path(__file__).parent.parent
DEBIAN = PROJECT / "dist" / "test-images" / "debian"
WAIT = PATIENCE  # seconds for one answer of an emulated guest


@pytest.fixture(scope="module", params=machinekit.KINDS)
def debian(
    request: pytest.FixtureRequest, module_machines_home: Path, elf: Path
) -> Iterator[Machine]:
    image = imagefactory.debian_layout(DEBIAN)
    memory = "1G" if request.param == "qemu" else "512M"  # in namespaces it is the host's
    with boot(image, machine=request.param, memory=memory) as machine:
        machine.agent.ping()  # makes the connection that is kept for small requests
        yield machine


@pytest.fixture
def emulated(debian: Machine) -> Machine:
    if not debian.url.startswith("hybrid:"):
        pytest.skip("only a virtual machine with the hybrid socket has vsock of its own here")
    return debian


# ── real programs ────────────────────────────────────────────────────────────────────────────────


def test_package_database_is_consistent(debian: Machine) -> None:
    listed = debian.agent.exec(["dpkg", "--list"], check=True).stdout.decode()
    assert "ii  python3-minimal" in listed
    assert debian.agent.exec(["dpkg", "--audit"], check=True).stdout == b""


def test_python_computes(debian: Machine) -> None:
    program = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    data = bytes(range(256)) * 4096
    result = debian.agent.exec(["python3", "-c", program], input=data, timeout=PATIENCE, check=True)
    assert result.stdout.decode().strip() == hashlib.sha256(data).hexdigest()


def test_shell_pipeline(debian: Machine) -> None:
    line = "find /usr/share -name '*.conf*' | sort | tee /tmp/list | wc -l; test -s /tmp/list"
    result = debian.agent.exec(["bash", "-o", "pipefail", "-c", line], timeout=PATIENCE, check=True)
    assert int(result.stdout) > 0
    assert debian.agent.exec(["wc", "-l", "/tmp/list"]).stdout.split()[0] == result.stdout.strip()


def test_setuid_programs_work_for_users(debian: Machine) -> None:
    mode = debian.agent.exec(["stat", "-c", "%a %U", "/usr/bin/passwd"]).stdout
    assert mode == b"4755 root\n"
    script = "id -u; su --help >/dev/null && echo fine"
    assert debian.agent.exec(["sh", "-c", script], user="nobody").stdout == b"65534\nfine\n"


# ── hostile programs ─────────────────────────────────────────────────────────────────────────────

# The ioctl is IOCTL_VM_SOCKETS_GET_LOCAL_CID of linux/vm_sockets.h.
OWN_CID = """
import fcntl
print(int.from_bytes(fcntl.ioctl(open("/dev/vsock"), 0x7B9, bytes(4)), "little"))
"""

DIAL = """
import socket, sys
for cid in map(int, sys.argv[1:]):
    dialled = socket.socket(socket.AF_VSOCK)
    dialled.settimeout(10)
    try:
        dialled.connect((cid, 1024))
        dialled.send(b"\\x89mgst\\n\\0\\1")
        print(cid, dialled.recv(1))
    except OSError as error:
        print(cid, error.errno or "still open")
"""


def test_programs_in_the_guest_cannot_dial_the_agent(emulated: Machine) -> None:
    own = emulated.agent.exec(["python3", "-c", OWN_CID], check=True)
    loopback = "1"
    dial = ["python3", "-c", textwrap.dedent(DIAL), loopback, own.stdout.decode().strip()]
    result = emulated.agent.exec(dial, user="nobody", timeout=PATIENCE, check=True)
    answers = [line.split(maxsplit=1) for line in result.stdout.decode().splitlines()]
    assert [cid for cid, _ in answers] == dial[3:]
    # The kernel has no loopback, and the host drops what is for others than itself.
    refusals = {str(number) for number in (errno.ENODEV, errno.ECONNRESET, errno.ETIMEDOUT)}
    assert {answer for _, answer in answers} <= refusals
    assert emulated.agent.ping().root_ready


def test_wrong_token_is_refused(debian: Machine) -> None:
    with pytest.raises(OperationError) as refused:
        connect(debian.url, token="not the token of this machine")
    assert refused.value.code == "unauthorized"
    assert debian.agent.ping().root_ready


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x89mgst\n\x00\x01" + b"\xff\xff\xff\xff\x01\x00\x00\x00",  # a frame of 4 GiB
        b"\x89mgst\n\x00\x01" + b"\x00\x00\x00\x40\x01\x00\x00\x00half",  # a frame cut short
        b"",
    ],
    ids=["garbage", "huge frame", "truncated frame", "silence"],
)
def test_bad_peers_are_dropped_in_time(emulated: Machine, sent: bytes) -> None:
    with dial_raw(emulated) as peer:
        peer.sendall(sent)
        answer = b""
        while piece := peer.recv(4096):
            answer += piece
    assert len(answer) < 300  # at most one error frame
    assert emulated.agent.exec(["true"], timeout=WAIT).returncode == 0


def test_many_silent_connections_do_not_stop_the_agent(emulated: Machine) -> None:
    before = emulated.agent.info().resident_kib
    with contextlib.ExitStack() as silent:
        for _ in range(500):
            silent.enter_context(dial_raw(emulated))
        assert emulated.agent.exec(["echo", "alive"], timeout=WAIT).stdout == b"alive\n"
    assert emulated.agent.info().resident_kib - before < 2048


def dial_raw(machine: Machine) -> socket.socket:
    """A connection to the agent's port that has said nothing yet."""
    path = machine.url.removeprefix("hybrid://").partition("?")[0]
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(path)
    peer.settimeout(WAIT)
    peer.sendall(b"CONNECT 1024\n")
    return peer
