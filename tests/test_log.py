"""What the library logs: the moments that matter, to who listens, and no secrets."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from agentharness import TOKEN, AgentProcess
from hostkit import Peer, agent_at, serving
from patience import PATIENCE

from microguest import ConnectionLost, boot, connect, find, list_machines
from microguest.guest.wire.connection import Response
from microguest.guest.wire.messages import Started
from microguest.host_client.log import DEBUG, WARNING, note


def test_moments_of_a_machine(
    image: str, machines_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "microguest")
    secret = "hunter2-in-the-environment"
    with boot(image, machine="namespaces", name="first", env={"PASSWORD": secret}) as machine:
        token = (machines_home / "first" / "token").read_text().strip()
        machine.agent.exec(["sh", "-c", ": said-in-an-argument"], env={"P": secret}, input=b"typed")
        process = machine.agent.start(["sleep", "1000"])
        find("first").kill()
        with pytest.raises(ConnectionLost):
            process.wait(PATIENCE)
        process.close()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("INFO", f"machine first: namespaces of {image}") in said
    texts = "\n".join(text for _, text in said)
    assert "machine first: ready after" in texts
    assert "connected" in texts
    assert "start 'sh'" in texts
    assert "connection lost: machine first has ended" in texts
    assert {name for name, *_ in caplog.record_tuples} == {"microguest"}
    for hidden in (token, secret, "said-in-an-argument", "typed", "PASSWORD"):
        assert hidden not in texts
    assert all(text.isprintable() for _, text in said)


def test_what_a_dead_machine_left_is_logged(
    machines_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale = machines_home / "stale"
    (stale / "run").mkdir(parents=True, mode=0o700)
    for path in (stale, *stale.parents[:3]):
        path.chmod(0o700)
    caplog.set_level(logging.INFO, "microguest")
    assert list_machines() == []
    assert "machine stale: " in caplog.text


def dies(peer: Peer) -> None:
    peer.greet()
    peer.send(Response(result=Started(id="p1", pid=7)))


def test_lost_connection_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "agent.sock"
    with (
        serving(path, dies),
        agent_at(path) as agent,
        agent.start(["cat"]) as process,
        pytest.raises(ConnectionLost),
    ):
        process.wait(PATIENCE)
    assert [record.levelname for record in caplog.records if "lost" in record.getMessage()] == [
        "WARNING"
    ]


def test_messages_are_printable_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    note(WARNING, "it said %s", "\x1b]0;title\x07" + "x" * 10_000)
    (record,) = caplog.records
    assert record.getMessage().startswith("it said \\x1b]0;title\\x07xxx")
    assert len(record.getMessage()) <= 300


def test_nobody_who_does_not_listen_pays_or_hears(elf: Path) -> None:
    with AgentProcess() as agent:
        quiet = (
            "import sys\nfrom microguest import connect\n"
            f"connect('unix://{agent.path}', token='{TOKEN}').close()\n"
            "print('logging' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", quiet], capture_output=True, check=True)
        assert done.stdout == b"False\n"
        unheard = (
            "import logging\nfrom microguest.host_client.log import note\nnote(30, 'a warning')\n"
        )
        done = subprocess.run([sys.executable, "-c", unheard], capture_output=True, check=True)
        assert done.stderr == b""
        with connect(f"unix://{agent.path}", token=TOKEN) as client:
            assert client.exec(["true"]).returncode == 0


def test_a_lock_that_an_interrupt_left_taken_holds_up_nobody() -> None:
    note(DEBUG, "the first time")
    done = threading.Event()

    def tell() -> None:
        note(DEBUG, "from a thread")
        done.set()

    thread = threading.Thread(target=tell)
    with logging._lock:  # type: ignore[attr-defined]
        thread.start()
        heard = done.wait(PATIENCE)
    thread.join()
    assert heard
