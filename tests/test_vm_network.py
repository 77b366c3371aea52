"""The network in a real machine: virtio_net behind QEMU's user network, the kernel's `ip=`.

QEMU's network has a gateway at 10.0.2.2 (which leads to the host's loopback), DHCP, a name server
at 10.0.2.3, and fec0::/64. One boot each, with many looks.
"""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from init_machine import make_root, require_program
from vm_machine import Ended, make_erofs, run_vm, vm_config

pytestmark = pytest.mark.qemu

MAC = "52:54:00:12:34:56"
OTHER = "52:54:00:12:34:57"
NETWORK = f"virtio-net-pci,netdev=n0,mac={MAC}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    folder = tmp_path_factory.mktemp("network")
    root = make_root(folder / "root")
    (root / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    return make_erofs(root, folder / "image")


def boot(image: Path, script: str, *, line: str = "", second: bool = False, **config: Any) -> Ended:
    """A machine with a network card (two, with `second`) and a shell script as its workload."""
    cards = ["-netdev", "user,id=n0", "-device", NETWORK]
    if second:
        cards += ["-netdev", "user,id=n1", "-device", f"virtio-net-pci,netdev=n1,mac={OTHER}"]
    whole = {**vm_config(["/bin/sh", "-c", script]), **config}
    return run_vm(whole, disks={"root": image}, options=cards, kernel_line=line)


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    """A server on the host's loopback that answers with one line. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the host answers\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_dhcp_static_addresses_a_new_name_and_the_world_behind(image: Path) -> None:
    network = {
        "interfaces": [
            {
                "name": "lan0",
                "mac": MAC.upper(),
                "dhcp": True,
                "mtu": 1400,
                "addresses": ["fec0::77/64"],
                "routes": [{"via": "fec0::2"}, {"to": "192.168.99.0/24", "via": "10.0.2.9"}],
            }
        ],
        "options": ["ndots:2"],
        "hosts": {"10.0.2.2": ["gate"]},
    }
    with web_server() as port:
        ended = boot(
            image,
            "set -x; cat /sys/class/net/lan0/mtu; ip -o addr show lan0; ip route; ip -6 route;"
            f"ping -c1 -W5 gate; ping -6 -c1 -W5 fec0::2; wget -qO- http://gate:{port}/;"
            "httpd -p [fec0::77]:80 -h /etc && wget -qO- http://[fec0::77]/hosts;"
            "cat /etc/resolv.conf; hostname;"
            "for pid in $(pidof dhcp); do cat /proc/$pid/oom_score_adj; done",
            network=network,
            hostname="web.example",
        )
    text = ended.console
    assert "\n1400\r\n" in text
    assert "inet 10.0.2.15/24 brd 10.0.2.255 scope global dynamic lan0" in text
    assert "inet6 fec0::77/64 scope site" in text
    assert "tentative" not in text.partition("fec0::77/64")[2].partition("\n")[0]
    assert "default via 10.0.2.2 dev lan0  src 10.0.2.15" in text
    assert "192.168.99.0/24 via 10.0.2.9 dev lan0" in text
    assert "default via fec0::2 dev lan0" in text
    assert text.count("1 packets received") == 2, text
    assert "the host answers" in text
    assert "10.0.2.2\tgate\r\n" in text
    assert "nameserver 10.0.2.3\r\noptions ndots:2\r\n" in text
    assert "\nweb.example\r\n" in text
    assert text.count("\n-1000\r\n") == 2  # memory that others use up costs no lease


def test_a_root_that_cannot_be_written_to(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    (root / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (root / "etc" / "machine-id").touch()
    for name in ("proc", "sys", "dev", "run"):
        (root / name).mkdir()
    config: dict[str, Any] = {**vm_config()["root"], "upper": None, "read_only": True}
    ended = boot(
        make_erofs(root, tmp_path / "image"),
        "cd /etc; cat resolv.conf hosts machine-id; ls -l resolv.conf; hostname",
        root=config,
        network={"interfaces": [{"dhcp": True}]},
        hostname="web",
        machine_id="0123456789abcdef0123456789abcdef",
    )
    assert ended.lines[:4] == [
        "nameserver 10.0.2.3",
        "127.0.0.1 localhost",
        "127.0.1.1\tweb",
        "0123456789abcdef0123456789abcdef",
    ]
    assert ended.lines[-1] == "web"
    assert "stub-resolv.conf" in ended.lines[-2]  # written through
    assert "/etc/hostname is not as the machine was told: Read-only file system" in ended.console


def test_a_lease_is_kept_under_an_init_of_the_images_own(image: Path) -> None:
    ended = boot(
        image,
        "echo init is $$; ip -4 -o addr show eth0; pidof dhcp | wc -w; poweroff -f",
        mode="handoff",
        network={"interfaces": [{"dhcp": True}]},
    )
    assert ended.lines[0] == "init is 1"
    assert "inet 10.0.2.15/24" in ended.lines[1]
    assert ended.lines[2] == "2"


def test_two_cards_change_their_names(image: Path) -> None:
    interfaces = [
        {"name": "eth0", "mac": OTHER, "addresses": ["10.50.0.1/24"]},
        {"name": "eth1", "mac": MAC, "addresses": ["10.60.0.1/24"]},
    ]
    ended = boot(
        image,
        "cat /sys/class/net/eth0/address /sys/class/net/eth1/address; ip -4 -o addr; ls -l /etc",
        second=True,
        network={"interfaces": interfaces},
    )
    assert ended.lines[:2] == [OTHER, MAC]
    assert "eth0    inet 10.50.0.1/24" in ended.console
    assert "eth1    inet 10.60.0.1/24" in ended.console
    assert "resolv.conf -> ../run/systemd" in ended.console  # no names were given


def test_the_kernels_line_is_followed(image: Path) -> None:
    line = "ip=10.0.2.77::10.0.2.2:255.255.255.0:kname:eth0:off:10.0.2.3:10.0.2.4"
    ended = boot(image, "ip -o addr; ip route; cat /etc/resolv.conf /etc/hostname", line=line)
    assert "inet 10.0.2.77/24" in ended.console
    assert "default via 10.0.2.2 dev eth0" in ended.console
    assert ended.lines[-3:] == ["nameserver 10.0.2.3", "nameserver 10.0.2.4", "kname"]


def test_the_config_wins_over_the_kernels_line(image: Path) -> None:
    ended = boot(
        image,
        "ip -4 -o addr; cat /etc/hostname",
        line="ip=10.0.2.77::10.0.2.2:255.255.255.0:kname:eth0:off",
        network={"interfaces": [{"addresses": ["10.0.2.50/24"]}]},
        hostname="own",
    )
    assert "10.0.2.50/24" in ended.console
    assert "10.0.2.77" not in ended.console
    assert ended.lines[-1] == "own"


def test_the_kernels_line_can_ask_for_dhcp(image: Path) -> None:
    ended = boot(image, "ip -o addr; cat /etc/resolv.conf", line="ip=dhcp")
    assert "inet 10.0.2.15/24" in ended.console
    assert ended.lines[-1] == "nameserver 10.0.2.3"


def test_a_kernels_line_that_is_wrong_fails_the_boot(image: Path) -> None:
    name, failed = boot(image, "true", line="ip=10.0.2.300").report()
    assert (name, failed["step"]) == ("boot_failed", "network")
    assert failed["message"] == (
        "ip=10.0.2.300 on the kernel's command line: '10.0.2.300' is not an IP address"
    )
