"""The network that PID 1 sets up: netlink beside iproute2, files of the image, DHCP leases.

Whole boots in namespaces, where the test puts one end of a veth pair into the machine while PID 1
waits for it; tests/test_vm_network.py has what needs QEMU.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dhcp_server
import pytest
from init_machine import (
    PROJECT,
    Config,
    Machine,
    boot_config,
    command_of,
    descendants,
    make_root,
    require_program,
    shell,
    state_of,
    wait_for,
)
from patience import PATIENCE, SLACK
from test_agent_traced import PRELUDE

from microguest.guest.privileges import capability_mask
from microguest.init_shim.network import dhcp_packets
from microguest.init_shim.network.dhcp_packets import ACK, DISCOVER, FOREVER, OFFER

MAC = bytes.fromhex("525400123456")
# As in init_shim/network/dhcp.py, which cannot be imported here.
CAPABILITIES = ("net_admin", "net_raw", "net_bind_service", "chown", "dac_override", "fowner")
SERVER = PROJECT / "tests" / "dhcp_server.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    require_program()
    if shutil.which("ip") is None:
        pytest.skip("needs ip: apt install iproute2")
    return make_root(tmp_path / "image")


def output_of(image: Path, script: str, **config: Any) -> str:
    """The console of a machine whose workload is a shell script, after its clean end."""
    with Machine(image, {**boot_config(shell(script)), **config}) as machine:
        finish(machine)
        return machine.console


def finish(machine: Machine) -> None:
    """Until the workload has ended well, and the machine with it."""
    machine.report("ready")
    machine.report("workload_started")
    assert machine.report("workload_exited")["code"] == 0, machine.console
    machine.wait()


# ── rtnetlink ────────────────────────────────────────────────────────────────────────────────────

NETLINK_SCRIPT = """
    import subprocess
    from microguest.guest.boot.network import Interface, Network, Route
    from microguest.init_shim.network import interfaces
    from microguest.init_shim.network.addresses import packed_address, parse_prefix
    from microguest.init_shim.failure import Failure
    from microguest.init_shim.network.netlink import Netlink

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    ip("link", "set", "lo", "up")
    for a, b, mac in (("eth0", "peer0", "0a"), ("eth1", "peer1", "0b")):
        mac = f"02:00:00:00:00:{mac}"
        ip("link", "add", a, "address", mac, "type", "veth", "peer", "name", b)
        ip("link", "set", b, "up")
"""


def in_new_network(script: str) -> list[list[dict[str, Any]]]:
    """Run a script in a new network namespace. Returns ip's links, IPv4 and IPv6 routes then."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    script = textwrap.dedent(NETLINK_SCRIPT) + textwrap.dedent(script)
    shown = 'for what in "-d addr" "-4 route" "-6 route"; do echo "$(ip -j $what)"; done'
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", f'"$0" -c "$1" && {shown}', sys.executable, script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=PROJECT,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line or "[]") for line in done.stdout.splitlines()]


def test_interfaces_are_what_iproute2_sees() -> None:
    links, routes, routes6 = in_new_network(
        """
        plan = Network(interfaces=(
            Interface(name="eth0", mac="02:00:00:00:00:0B", mtu=1400,
                      addresses=("10.1.0.5/24", "10.1.0.6/32", "fd00:1::5/64"),
                      routes=(Route(via="10.1.0.1"), Route(via="fd00:1::1"),
                              Route(to="10.7.0.0/16", via="10.1.0.2", metric=50),
                              Route(to="fd00:7::/48"))),
            Interface(name="lan", mac="02:00:00:00:00:0a", addresses=("192.168.3.1/31",),
                      routes=(Route(to="10.8.0.0/24", via="172.16.0.1"),)),
        ))
        interfaces.set_up(plan)
        interfaces.set_up(plan.replace(interfaces=(plan.interfaces[1],)))  # again: nothing changes
        """
    )
    by_name = {link["ifname"]: link for link in links}
    eth0, lan = by_name["eth0"], by_name["lan"]
    assert (eth0["address"], eth0["mtu"]) == ("02:00:00:00:00:0b", 1400)
    assert lan["address"] == "02:00:00:00:00:0a"
    assert {"UP", "LOWER_UP"} <= set(eth0["flags"])
    found = {(a["local"], a["prefixlen"], a["scope"]) for a in eth0["addr_info"]}
    assert {
        ("10.1.0.5", 24, "global"),
        ("10.1.0.6", 32, "global"),
        ("fd00:1::5", 64, "global"),
    } < found
    static = next(a for a in eth0["addr_info"] if a["local"] == "fd00:1::5")
    assert (static.get("nodad"), static.get("tentative")) == (True, None)
    assert (
        next(a for a in eth0["addr_info"] if a["local"] == "10.1.0.5")["broadcast"] == "10.1.0.255"
    )
    assert "broadcast" not in lan["addr_info"][0]
    ways = {(r["dst"], r.get("gateway"), r["dev"], r.get("metric"), *r["flags"]) for r in routes}
    assert ("default", "10.1.0.1", "eth0", None) in ways
    assert ("10.7.0.0/16", "10.1.0.2", "eth0", 50) in ways
    assert ("10.8.0.0/24", "172.16.0.1", "lan", None, "onlink") in ways
    ways6 = {(r["dst"], r.get("gateway"), r["dev"]) for r in routes6}
    assert {("default", "fd00:1::1", "eth0"), ("fd00:7::/48", None, "eth0")} <= ways6


def test_a_name_that_is_taken_is_given_up() -> None:
    links, _, _ = in_new_network(
        """
        ip("link", "set", "eth0", "up")
        interfaces.set_up(Network(interfaces=(Interface(name="eth0", mac="02:00:00:00:00:0b"),)))
        """
    )
    names = {link["address"]: link["ifname"] for link in links}
    assert names["02:00:00:00:00:0b"] == "eth0"
    assert names["02:00:00:00:00:0a"].startswith("link")


def test_a_pulled_cable_does_not_stop_the_boot() -> None:
    links, _, _ = in_new_network(
        """
        ip("link", "set", "peer0", "down")
        interfaces.set_up(Network(interfaces=(Interface(addresses=("10.1.0.5/24",)),)))
        """
    )
    eth0 = next(link for link in links if link["ifname"] == "eth0")
    assert "NO-CARRIER" in eth0["flags"]
    assert eth0["addr_info"][0]["local"] == "10.1.0.5"


def test_what_the_kernel_refuses_is_told_in_its_words() -> None:
    in_new_network(
        """
        netlink = Netlink()
        link = next(link for link in netlink.links() if link.name == "eth0")
        netlink.bring_up(link)
        to, via = parse_prefix("10.5.0.0/16"), packed_address("10.6.0.1")
        for ask, expected in (
            (lambda: netlink.set_route(link, to, via),
             "route 10.5.0.0/16 via 10.6.0.1 on eth0: Network is unreachable "
             "(Nexthop has invalid gateway)"),
            (lambda: netlink.rename(link, "peer0"), "rename eth0 to peer0: File exists"),
            (lambda: parse_prefix("10.0.0.1/33"),
             "'10.0.0.1/33': the length of the network is at most 32"),
            (lambda: parse_prefix("10.0.0.1/x"),
             "'10.0.0.1/x' is not an address and a length, as 10.0.2.15/24"),
            (lambda: parse_prefix("::g"), "'::g' is not an IP address"),
        ):
            try:
                ask()
            except Failure as failure:
                assert failure.message == expected, failure.message
            else:
                raise AssertionError(expected)
        prefix = parse_prefix("10.4.0.1/24")
        netlink.remove_address(link, prefix)  # not there: fine
        netlink.remove_route(link, prefix)
        assert not netlink.has_address(link.index)
        netlink.set_address(link, prefix, 100)
        assert netlink.has_address(link.index)
        """
    )


def test_the_kernels_line_is_read_as_the_kernel_does() -> None:
    in_new_network(
        """
        from microguest.init_shim.network.kernel_line import planned

        def seen(value, plan=Network()):
            plan, hostname = planned(value, plan)
            return [
                (i.name, i.addresses, tuple(r.via for r in i.routes), i.dhcp)
                for i in plan.interfaces
            ], plan.nameservers, hostname

        for value in ("", "off", "none", "::::::off", ":::::eth0:none"):
            assert seen(value) == ([], (), ""), value
        for value in ("dhcp", "on", "any", "both", ":::::eth1:dhcp"):
            name = "eth1" if "eth1" in value else "peer0"  # the first by index
            assert seen(value) == ([(name, (), (), True)], (), ""), value
        assert seen(":::::peer0") == ([], (), "")
        assert seen("10.1.1.1:::::eth0") == ([("eth0", ("10.1.1.1/8",), (), False)], (), "")
        assert seen("172.16.1.1:::::eth0")[0][0][1] == ("172.16.1.1/16",)
        assert seen("192.168.1.1:::::eth0")[0][0][1] == ("192.168.1.1/24",)
        whole = "10.1.1.1:9.9.9.9:10.1.1.254:255.255.255.0:web:eth0:off:8.8.8.8:8.8.4.4:1.1.1.1"
        static = [("eth0", ("10.1.1.1/24",), ("10.1.1.254",), False)]
        assert seen(whole) == (static, ("8.8.8.8", "8.8.4.4"), "web")
        own = Network(nameservers=("10.0.0.53",))
        assert seen(whole, own) == (static, ("10.0.0.53",), "web")
        for value, why in (
            ("bootp", "'bootp' is not an IP address"),
            (":::::eth0:rarp", "autoconf 'rarp' is not one of dhcp, on, any, both, off, none"),
            ("fd00", "'fd00' is not an IP address"),
            ("10.0.0.1:::255.0.255.0::eth0", "'255.0.255.0' is not a netmask"),
            ("10.0.0.1::10.0.0:::eth0", "'10.0.0' is not an IP address"),
            (":::::eth9:dhcp", "there is no network interface eth9"),
            ("1:" * 10 + "1", "it has 11 fields, at most 10"),
        ):
            try:
                planned(value, Network())
            except Failure as failure:
                assert failure.message.endswith(f"command line: {why}"), failure.message
            else:
                raise AssertionError(value)
        ip("addr", "add", "10.3.3.3/24", "dev", "eth0")  # as a kernel with CONFIG_IP_PNP does
        assert seen(whole) == ([], (), "web")
        """
    )


# ── files of the image ───────────────────────────────────────────────────────────────────────────

NAMES = {"nameservers": ["10.0.2.3", "fd00::3"], "search": ["lan.example"], "options": ["ndots:2"]}
RESOLV_CONF = "nameserver 10.0.2.3\nnameserver fd00::3\nsearch lan.example\noptions ndots:2\n"
STUB = "../run/systemd/resolve/stub-resolv.conf"


def test_an_image_keeps_its_files_where_nothing_is_configured(root: Path) -> None:
    for name in ("resolv.conf", "hosts", "hostname", "machine-id"):
        (root / "etc" / name).write_text(f"{name} of the image\n")
    told = output_of(root, "cd /etc; cat resolv.conf hosts hostname machine-id; hostname")
    assert told == (
        "resolv.conf of the image\nhosts of the image\nhostname of the image\n"
        "machine-id of the image\nmicroguest\n"
    )


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", ["missing", "file", "stub", "absolute", "loop", "outside"])
def test_resolv_conf_is_written_whatever_was_there(root: Path, kind: str, read_only: bool) -> None:
    path = root / "etc" / "resolv.conf"
    outside = root.parent / "outside"
    outside.write_text("the host's\n")
    match kind:
        case "file":
            path.write_text("nameserver 9.9.9.9\n")
        case "stub":
            path.symlink_to(STUB)
        case "absolute":
            path.symlink_to("/var/lib/resolv.conf")
        case "loop":
            path.symlink_to("resolv.conf")
        case "outside":
            path.symlink_to("../" * 20 + str(outside))
    config: Config = {"network": NAMES}
    config["root"] = {**boot_config()["root"], "read_only": read_only}
    script = "cat /etc/resolv.conf; stat -c '%F %a %u:%g' /etc/resolv.conf; ls -A /etc"
    told = output_of(root, script, **config)
    assert told == RESOLV_CONF + "regular file 644 0:0\ngroup\npasswd\nresolv.conf\n"
    assert outside.read_text() == "the host's\n"


def test_every_name_that_is_given_gets_its_file(root: Path) -> None:
    shutil.rmtree(root / "etc")
    told = output_of(
        root,
        "cd /etc; cat hostname machine-id hosts; stat -c %a . hostname machine-id; hostname",
        hostname="web.example",
        machine_id="0123456789abcdef0123456789abcdef",
        network={"hosts": {"10.0.2.2": ["gate", "gate.example"]}},
    )
    assert told.splitlines() == [
        "web.example",
        "0123456789abcdef0123456789abcdef",
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        "127.0.1.1\tweb.example web",
        "10.0.2.2\tgate gate.example",
        "755",
        "644",
        "444",
        "web.example",
    ]


def test_another_name_takes_the_line_of_the_one_before(root: Path) -> None:
    """As on a root that is kept: /etc/hosts does not grow with each boot."""
    image = "127.0.0.1 localhost\n127.0.0.1\tfirst.example first\n10.1.1.1 first.example other\n"
    (root / "etc" / "hosts").write_text(f"{image}127.0.1.1\tfirst.example first\n")
    (root / "etc" / "hostname").write_text("first.example\n")
    told = output_of(root, "cat /etc/hosts", hostname="second")
    assert told == f"{image}127.0.1.1\tsecond\n"
    (root / "etc" / "hosts").write_text(f"{image}10.0.2.15\tfirst.example first\n")
    assert output_of(root, "cat /etc/hosts", hostname="second") == told
    (root / "etc" / "hosts").write_text("127.0.1.1\tfirst.example first")  # nothing else
    told = output_of(root, "cat /etc/hosts", hostname="second")
    assert told.splitlines()[-1] == "127.0.1.1\tsecond"
    assert "first" not in told


def test_a_host_name_alone_adds_one_line_to_the_images_hosts(root: Path) -> None:
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n10.1.1.1 db # web\n10.2.2.2 cache")
    told = output_of(root, "cat /etc/hosts", hostname="web")
    assert told == "127.0.0.1 localhost\n10.1.1.1 db # web\n10.2.2.2 cache\n127.0.1.1\tweb\n"
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost web\n")
    assert output_of(root, "cat /etc/hosts", hostname="web") == "127.0.0.1 localhost web\n"


@pytest.mark.parametrize("trap", ["fifo", "huge", "/proc/kmsg", "/dev/zero", "hosts"])
def test_hosts_that_are_a_trap_do_not_hold_the_boot(root: Path, trap: str) -> None:
    """One that is too large stays; what is no file, or has nothing in it, becomes one."""
    place = root / "etc" / "hosts"
    if trap == "fifo":
        os.mkfifo(place)
    elif trap == "huge":
        with place.open("wb") as file:
            file.truncate(4 * 1024**3)
    else:
        place.symlink_to(trap)
    expected = f"regular file {4 * 1024**3}\n" if trap == "huge" else "web\n"
    script = "tail -n 1 /etc/hosts | cut -f 2" if trap != "huge" else "stat -c '%F %s' /etc/hosts"
    assert output_of(root, script, hostname="web") == expected


def test_a_volume_over_a_file_stays(root: Path) -> None:
    volume = {"kind": "bind", "path": "/own.conf", "target": "/etc/resolv.conf"}
    (root / "etc" / "resolv.conf").write_text("the image's\n")
    (root / "own.conf").write_text("nameserver 1.1.1.1\n")
    told = output_of(root, "cat /etc/resolv.conf", network=NAMES, volumes=[volume])
    assert told == (
        "microguest: /etc/resolv.conf is a mount of its own and stays as it is\n"
        "nameserver 1.1.1.1\n"
    )


@pytest.mark.parametrize("there", [True, False], ids=["over-the-images", "none-in-the-image"])
def test_a_full_root_boots_with_the_right_names(root: Path, *, there: bool) -> None:
    """A page is all that the root's tmpfs holds, and the first file takes it."""
    names = ("hostname", "machine-id", "resolv.conf", "hosts")
    if there:
        for name in names:
            (root / "etc" / name).write_text("127.0.0.1 old\n")
    config: Config = {"network": NAMES, "hostname": "web", "machine_id": "0" * 31 + "1"}
    config["root"] = {**boot_config()["root"], "upper": {"size": "4k"}}
    script = (
        "echo more > /more || echo full; cd /etc; cat hostname machine-id resolv.conf hosts;"
        "stat -c '%F %a %u:%g' hostname resolv.conf machine-id; ls -A /etc | grep microguest;"
        "grep -c /etc/ /proc/mounts"
    )
    told = output_of(root, script, **config).splitlines()
    assert told[0].endswith("No space left on device")
    assert told[1:4] == ["full", "web", "0" * 31 + "1"]
    assert "\n".join(told[4:8]) + "\n" == RESOLV_CONF
    assert "127.0.1.1\tweb" in told
    assert told[-4:] == [
        "regular file 644 0:0",
        "regular file 644 0:0",
        "regular file 444 0:0",
        "3",
    ]


@pytest.mark.parametrize("link", ["home", "etc"])
def test_resolv_conf_of_a_read_only_root_is_not_written_through_a_users_link(
    root: Path, link: str
) -> None:
    """Root's own may lead to where a user has made another one, or be a user's itself."""
    (root / "home").mkdir()
    (root / "etc" / "resolv.conf").symlink_to("/home/resolv.conf")
    (root / "home" / "resolv.conf").symlink_to("/var/secret")
    os.lchown(root / link / "resolv.conf", 1000, 1000)
    for folder in ("proc", "sys", "dev", "run", "var"):
        (root / folder).mkdir()
    script = "cat /var/secret 2>/dev/null || echo untouched"
    config = boot_config(shell(script))
    config["network"] = NAMES
    config["root"]["upper"] = None
    config["volumes"] = [{"kind": "tmpfs", "target": "/var"}]
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        said, told = machine.console.splitlines()
    assert "/etc/resolv.conf is not as the machine was told" in said
    assert f"/{link}/resolv.conf, a symbolic link of user 1000" in said
    assert told == "untouched"


def test_what_was_made_of_etc_locks_nobody_out(root: Path) -> None:
    """As root in the machine may have done it on a disk that is kept: by directories of a name."""
    (root / "etc" / "hosts").mkdir()
    (root / "etc" / ".hostname.microguest").mkdir()
    config = boot_config(shell("cat /etc/hostname; hostname"))
    config["hostname"] = "web"
    with Machine(root, config) as machine:
        (left_out,) = machine.report("ready")["left_out"]
        assert left_out.startswith("/etc/hosts is not as the machine was told: Is a directory")
        assert machine.wait() == 0
        assert machine.console.splitlines()[-2:] == ["web", "web"]


def test_an_etc_that_is_a_file_locks_nobody_out(root: Path) -> None:
    shutil.rmtree(root / "etc")
    (root / "etc").touch()
    config = boot_config(shell("hostname"), user="0:0")
    config["network"], config["hostname"] = NAMES, "web"
    with Machine(root, config) as machine:
        left_out = machine.report("ready")["left_out"]
        assert {text.split()[0] for text in left_out} >= {"/etc/hostname", "/etc/resolv.conf"}
        assert machine.wait() == 0
        assert machine.console.splitlines()[-1] == "web"


def test_a_read_only_root_that_has_no_such_file_boots_and_says_so(root: Path) -> None:
    config: Config = {"network": NAMES, "hostname": "web"}
    config["root"] = {**boot_config()["root"], "upper": None}
    for folder in ("proc", "sys", "dev", "run"):
        (root / folder).mkdir()
    (root / "etc" / "hostname").write_text("old\n")
    told = output_of(root, "cat /etc/hostname; hostname; ls /etc", **config)
    assert "/etc/resolv.conf is not as the machine was told: Read-only file system" in told
    assert told.endswith("web\nweb\ngroup\nhostname\npasswd\n")


def test_a_link_of_a_full_root_is_written_through_where_there_is_room(root: Path) -> None:
    (root / "etc" / "resolv.conf").symlink_to(STUB)
    (root / "etc" / "hosts").symlink_to("own-hosts")
    (root / "etc" / "own-hosts").write_text("127.0.0.1 localhost\n")
    config: Config = {"network": NAMES, "hostname": "web"}
    config["root"] = {**boot_config()["root"], "upper": {"size": "4k"}}
    script = "cat /etc/resolv.conf /etc/own-hosts; readlink /etc/resolv.conf"
    told = output_of(root, script, **config)
    assert told == RESOLV_CONF + f"127.0.0.1 localhost\n127.0.1.1\tweb\n{STUB}\n"


def test_a_missing_interface_fails_the_boot_with_its_name(root: Path) -> None:
    config = {**boot_config(shell("true")), "network": {"interfaces": [{"name": "eth7"}]}}
    with Machine(root, config) as machine:
        failed = machine.report("boot_failed")
        assert failed["step"] == "network"
        assert failed["path"] == "eth7"
        assert failed["message"] == "no network interface eth7 after 3 s; interfaces: none"
        machine.wait()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            {"interfaces": [{"routes": [{"via": "10.0.0.1"}, {"to": "10.0.0.0/33"}]}]},
            (
                "network.interfaces[0].routes[1].to: "
                "'10.0.0.0/33': the length of the network is at most 32"
            ),
        ),
        (
            {"nameservers": ["fe80::1%eth0", "dns.example"]},
            "network.nameservers[1]: 'dns.example' is not an IP address",
        ),
        ({"nameservers": ["fe80::1%"]}, "network.nameservers[0]: 'fe80::1%' is not an IP address"),
        ({"hosts": {"gate": ["10.0.0.1"]}}, "network.hosts: 'gate' is not an IP address"),
    ],
)
def test_an_address_that_is_none_is_refused_by_its_field(
    root: Path, network: dict[str, Any], message: str
) -> None:
    with Machine(root, {**boot_config(shell("true")), "network": network}) as machine:
        failed = machine.report("boot_failed")
        machine.wait()
    assert failed["message"] == message


# ── DHCP: what the network says ──────────────────────────────────────────────────────────────────


def good_ack() -> bytes:
    return dhcp_server.reply(dhcp_packets.message(DISCOVER, 7, MAC), ACK)


def test_a_sound_answer_is_read() -> None:
    reply = dhcp_packets.parse_message(good_ack(), 7, MAC)
    assert reply is not None
    assert (reply.kind, reply.length, reply.lease, reply.renewal, reply.rebinding) == (
        5,
        24,
        4,
        2,
        3,
    )
    assert reply.routes == ((bytes(4), 0, bytes((10, 9, 0, 1))),)
    assert reply.nameservers == (bytes((10, 9, 0, 53)),)
    assert reply.domain == "lan.example"


def test_options_may_be_in_pieces_and_in_the_lent_fields() -> None:
    whole = good_ack()
    lent = whole[:108] + b"\x06\x02\x08\x08\xff".ljust(128, b"\0") + whole[236:-1]
    reply = dhcp_packets.parse_message(lent + b"\x34\x01\x01\x06\x02\x04\x04\xff", 7, MAC)
    assert reply is not None
    assert [server.hex() for server in reply.nameservers] == ["0a090035", "04040808"]


def test_endless_leases_never_need_renewing() -> None:
    ack = good_ack().replace(b"\x33\x04\0\0\0\x04", b"\x33\x04\xff\xff\xff\xff")
    reply = dhcp_packets.parse_message(ack, 7, MAC)
    assert reply is not None
    assert reply.lease == reply.renewal == reply.rebinding == FOREVER


def test_broken_answers_are_none_or_sound() -> None:
    """Every cut and every changed byte of a good answer, and of the packet around it."""
    ack = good_ack()
    sent = dhcp_packets.datagram(ack)
    packet = sent[:20] + sent[22:24] + sent[20:22] + sent[24:]  # from the server to the client
    assert dhcp_packets.parse_datagram(packet) == ack
    for size in range(len(packet)):
        assert dhcp_packets.parse_datagram(packet[:size]) is None
    for at in range(28):
        for value in range(256):
            payload = dhcp_packets.parse_datagram(packet[:at] + bytes((value,)) + packet[at + 1 :])
            assert payload is None or ack.startswith(payload)
    for size in range(len(ack)):
        check_sound(dhcp_packets.parse_message(ack[:size], 7, MAC))
    for at in (*range(44), *range(236, len(ack))):
        for value in range(256):
            check_sound(
                dhcp_packets.parse_message(ack[:at] + bytes((value,)) + ack[at + 1 :], 7, MAC)
            )


def check_sound(reply: dhcp_packets.Reply | None) -> None:
    if reply is None or reply.kind not in (OFFER, ACK):
        return
    assert 0 < reply.address[0] < 224
    assert 0 < reply.length <= 32
    assert 4 <= reply.lease <= FOREVER
    assert 0 < reply.renewal <= reply.rebinding <= reply.lease
    assert len(reply.nameservers) <= 3
    assert len(reply.routes) <= 32
    assert all(letter.isalnum() or letter in "-_." for letter in reply.domain)


# ── DHCP: whole boots ────────────────────────────────────────────────────────────────────────────


class Server:
    """dhcp_server.py beside a machine."""

    def __init__(self, machine: Machine, modes: tuple[str, ...], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["unshare", "-n", sys.executable, str(SERVER), str(machine.init_pid()), *modes],
                stdout=output,
            )

    @property
    def heard(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def count(self, kind: str) -> int:
        return sum(message["kind"] == kind for message in self.heard)


@contextlib.contextmanager
def served(
    image: Path, script: str, *modes: str, **config: Any
) -> Iterator[tuple[Machine, Server]]:
    """A machine whose eth0 has DHCP, and a server at the other end."""
    network = {"interfaces": [{"name": "eth0", "dhcp": True}], **config.pop("network", {})}
    config = {**boot_config(shell(script)), "network": network, **config}
    with Machine(image, config) as machine:
        server = Server(machine, modes, image.parent / "heard")
        try:
            yield machine, server
        finally:
            server.process.kill()
            server.process.wait()


def dhcp_processes(machine: Machine) -> list[int]:
    """The guard and its worker."""
    found = sorted(descendants(machine.init_pid()))
    return [pid for pid in found if command_of(pid)[:1] == ["dhcp"]]


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    pairs = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.strip() for name, value in pairs}


def test_a_lease_is_there_before_the_workload_and_is_kept(root: Path) -> None:
    script = "ip -4 addr show eth0; ip route; cat /etc/resolv.conf; sleep 1000"
    with served(root, script, "good", hostname="web") as (machine, server):
        machine.report("ready")
        wait_for(lambda: "search" in machine.console, "the workload")
        shown = machine.console
        assert "inet 10.9.0.77/24 brd 10.9.0.255 scope global dynamic eth0" in shown
        assert "default via 10.9.0.1 dev eth0  src 10.9.0.77" in shown
        assert shown.endswith("nameserver 10.9.0.53\nsearch lan.example\n")
        # Renewed where it was leased, by its own address, before it ends.
        wait_for(lambda: server.count("request") >= 3, "two renewals")
        renewals = server.heard[2:]
        assert {(r["kind"], r["from"], r["ciaddr"]) for r in renewals} == {
            ("request", "10.9.0.77", "0a09004d")
        }
        assert server.heard[0]["name"] == "web"
        # What reads strangers' packets is root for the network and for files only.
        guard, worker = dhcp_processes(machine)
        for pid in (guard, worker):
            held = status_of(pid)
            kept = {int(held[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")}
            assert kept == {capability_mask(CAPABILITIES)}
            assert (held["NoNewPrivs"], held["CapInh"], held["CapAmb"]) == ("1", "0" * 16, "0" * 16)
        # A client that dies is started again and goes on with the lease.
        os.kill(worker, 9)
        wait_for(
            lambda: "ended (signal 9); starting another" in machine.console, "the guard's word"
        )
        wait_for(lambda: server.count("discover") >= 2, "another client")
        heard = server.count("request")
        wait_for(lambda: server.count("request") >= heard + 2, "its lease and a renewal")
        assert machine.console.count("ended") == 1


def test_a_client_that_is_traced_when_it_dies_is_started_again(root: Path) -> None:
    """By the test, which is out of the guard's reach."""
    trace: dict[str, Any] = {}
    exec(PRELUDE, trace)
    with served(root, "sleep 1000", "long") as (machine, server):
        machine.report("ready")
        _, worker = dhcp_processes(machine)
        trace["trace"](worker)
        try:
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: server.count("discover") >= 2, "another client")
            assert "ended (a debugger keeps how); starting another" in machine.console
        finally:
            os.waitpid(worker, 0)
        # What was left of it is reaped with the next one.
        os.kill(dhcp_processes(machine)[-1], signal.SIGKILL)
        wait_for(lambda: not state_of(worker), "it is reaped")


def test_a_lease_is_looked_at_when_asked(root: Path) -> None:
    """As after a restore, when its server may have given the address away."""
    with served(root, "sleep 1000", "long") as (machine, server):
        machine.report("ready")
        time.sleep(0.3)
        assert server.count("request") == 1
        for pid in dhcp_processes(machine):
            os.kill(pid, signal.SIGUSR1)
        wait_for(lambda: server.count("request") >= 2, "a renewal")
        assert server.heard[-1]["from"] == "10.9.0.77"


def test_a_lost_lease_is_given_up_and_another_taken(root: Path) -> None:
    with served(root, "sleep 1000", "forget", "good") as (machine, server):
        machine.report("ready")
        wait_for(lambda: "lost its DHCP lease of 10.9.0.77/24" in machine.console, "the refusal")
        wait_for(lambda: server.count("discover") >= 2 and server.count("request") >= 3, "another")


def test_name_servers_change_with_the_lease_also_on_a_read_only_root(root: Path) -> None:
    script = (
        "await() { until grep -q $1 /etc/resolv.conf; do sleep 0.02; done; };"
        "await 10.9.0.2; await 10.9.0.3; await 10.9.0.4;"
        "grep -c resolv.conf /proc/mounts; cat /etc/resolv.conf; ! touch /etc/passwd"
    )
    plan = {**boot_config()["root"], "read_only": True}
    with served(root, script, "moving-names", root=plan) as (machine, _):
        finish(machine)
        lines = machine.console.splitlines()
    assert lines[:3] == ["1", "nameserver 10.9.0.4", "search lan.example"]


def test_hostile_and_refusing_servers_are_outlasted(root: Path) -> None:
    script = "ip -4 addr show eth0 | grep inet"
    with served(root, script, "hostile", "refuse", "good") as (machine, server):
        finish(machine)
        assert "10.9.0.77/24" in machine.console
        assert server.count("discover") >= 3


@pytest.mark.parametrize("mode", ["nasty-names", "far-gateway", "classless"])
def test_what_a_server_may_say(root: Path, mode: str) -> None:
    script = "cat /etc/resolv.conf; ip route; cat /sys/class/net/eth0/mtu"
    with served(root, script, mode) as (machine, _):
        finish(machine)
        lines = machine.console.splitlines()
    match mode:
        case "nasty-names":
            assert lines[:2] == [
                "nameserver 10.9.0.53",
                "default via 10.9.0.1 dev eth0  src 10.9.0.77 ",
            ]
        case "far-gateway":
            assert "default via 10.200.0.1 dev eth0  src 10.9.0.77 onlink " in lines
        case "classless":
            assert "default via 10.9.0.3 dev eth0  src 10.9.0.77 " in lines
            assert "10.50.0.0/24 via 10.9.0.2 dev eth0  src 10.9.0.77 " in lines
            assert lines[-1] == "1300"


def test_the_configs_name_servers_win(root: Path) -> None:
    with served(root, "cat /etc/resolv.conf", "good", network=NAMES) as (machine, _):
        finish(machine)
        assert machine.console == RESOLV_CONF


def test_a_machine_that_is_told_to_end_does_not_wait_for_its_lease(root: Path) -> None:
    with served(root, "true", "silent") as (machine, server):
        wait_for(lambda: server.count("discover") >= 1, "the question")
        machine.process.terminate()
        assert machine.report("stopping")["status"] == "shutdown"
        machine.no_more_reports()
        assert machine.wait() == 0


@pytest.mark.slow
def test_no_server_fails_the_boot_in_time(root: Path) -> None:
    began = time.monotonic()
    with served(root, "true", "silent") as (machine, server):
        failed = machine.report("boot_failed")
        assert (failed["step"], failed["path"]) == ("network", "eth0")
        assert failed["message"] == (
            "network interface eth0: no DHCP server gave a lease within 10 s"
        )
        assert server.count("discover") >= 3
        machine.wait()
    assert time.monotonic() - began < 30 + SLACK
