"""Hardening as far as namespaces show it, and what of the host a machine there leaves alone."""

import re
from pathlib import Path
from typing import Any

import pytest
from init_machine import Machine, boot_config, make_root, require_program
from plainpython import needs_guestsys

from microguest.init_shim.failure import Failure
from microguest.init_shim.hardening import sysctls

DOCUMENT = Path(__file__).parent.parent / "docs" / "design" / "security.md"
SYSCTLS = Path("/proc/sys")


# What strict leaves as the kernel has it.
KERNELS_OWN = {"net.ipv4.ip_unprivileged_port_start": "1024", sysctls.PING_GROUPS: "1\t0"}


def profile(name: str) -> dict[str, str]:
    """Paths and values of a profile, by the product's own tables."""
    table = {**sysctls.SERVERS, **sysctls.DEFAULT}
    if name == "strict":
        table |= {**sysctls.STRICT, **KERNELS_OWN}
    table |= sysctls.LOCKED_MODULES
    # The kernel separates two numbers by a tab.
    return {sysctls.path_of(key): "\t".join(value.split()) for key, value in table.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def console_of(root: Path, script: str, hardening: dict[str, Any]) -> list[str]:
    """What a workload prints in a machine with this hardening."""
    config = boot_config(["sh", "-c", script])
    config["hardening"] = hardening
    with Machine(root, config) as machine:
        machine.report("ready")
        assert machine.wait() == 0
        return machine.console.splitlines()


def failure_of(root: Path, name: str) -> dict[str, Any]:
    """The failed boot of a machine that shall set this sysctl."""
    config = boot_config(["true"])
    config["hardening"] = {"sysctls": {name: "1"}}
    with Machine(root, config) as machine:
        return machine.report("boot_failed")


# ── names ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kernel.yama.ptrace_scope", "kernel/yama/ptrace_scope"),
        ("kernel/yama/ptrace_scope", "kernel/yama/ptrace_scope"),
        ("net.ipv4.conf.eth0/1.forwarding", "net/ipv4/conf/eth0.1/forwarding"),
        ("net/ipv4/conf/eth0.1/forwarding", "net/ipv4/conf/eth0.1/forwarding"),
    ],
)
def test_names_are_read_as_sysctl_does(name: str, path: str) -> None:
    assert sysctls.path_of(name) == path


@pytest.mark.parametrize(
    "name", ["", "a..b", "a/../b", "net.//.//.x", "a/", "/etc/passwd", "a/./b", "a//b", "a.b\0"]
)
def test_names_do_not_lead_out(name: str) -> None:
    with pytest.raises(Failure, match="not the name of a sysctl"):
        sysctls.path_of(name)


# ── in namespaces ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["default", "strict"])
def test_the_hosts_settings_stay_as_they_are(root: Path, name: str) -> None:
    shared = [SYSCTLS / path for path in profile(name) if not sysctls.is_namespaced(path)]
    before = {path: path.read_text() for path in shared if path.exists()}
    assert len(before) > 10
    lines = console_of(root, "echo done", {"profile": name})
    assert lines == ["done"]
    assert {path: path.read_text() for path in before} == before


def test_own_network_is_hardened(root: Path) -> None:
    script = "cat /proc/sys/net/ipv4/conf/*/send_redirects | sort | uniq -c"
    (count,) = console_of(root, script, {})
    assert re.fullmatch(r" *[3-9] 0", count)  # all, default and lo
    (count,) = console_of(root, script, {"profile": "off"})
    assert re.fullmatch(r" *[3-9] 1", count)


def test_own_sysctls_are_set(root: Path) -> None:
    own = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "net/core/somaxconn": "77"}
    script = "cd /proc/sys; cat net/ipv4/ip_forward kernel/shm_rmid_forced net/core/somaxconn"
    assert console_of(root, script, {"profile": "off", "sysctls": own}) == ["1", "1", "77"]


def test_a_sysctl_of_the_host_is_refused(root: Path) -> None:
    before = (SYSCTLS / "kernel" / "kptr_restrict").read_text()
    for name in ("kernel.kptr_restrict", "net.core.bpf_jit_harden"):
        failed = failure_of(root, name)
        assert failed["step"] == "hardening"
        assert "is the host's" in failed["message"]
        assert name.replace(".", "/") in failed["message"]
    assert (SYSCTLS / "kernel" / "kptr_restrict").read_text() == before


def test_a_sysctl_that_is_missing_or_refused_is_named(root: Path) -> None:
    failed = failure_of(root, "net.ipv4.nothing")
    assert (failed["step"], failed["syscall"]) == ("hardening", "open")
    assert failed["path"] == "/proc/sys/net/ipv4/nothing"
    for value in ("perhaps", "\ud800"):
        config = boot_config(["true"])
        config["hardening"] = {"sysctls": {"net.ipv4.ip_forward": value}}
        with Machine(root, config) as machine:
            failed = machine.report("boot_failed")
        assert (failed["syscall"], failed["path"]) == ("write", "/proc/sys/net/ipv4/ip_forward")


def test_strict_hides_and_protects(root: Path) -> None:
    script = """
        su -s /bin/sh tester -c 'test -e /proc/self/maps && test -e /proc/1 || echo hidden'
        ls -d /proc/1
        ls -A /sys/firmware
        for path in sys irq; do grep -c " /proc/$path proc ro" /proc/mounts; done
        cp /bin/busybox /dev/shm/; /dev/shm/busybox true 2>/dev/null; echo $?
    """
    lines = console_of(root, script, {"profile": "strict"})
    assert lines == ["hidden", "/proc/1", "1", "1", "126"]


@pytest.mark.parametrize(("name", "limit"), [("off", "unlimited"), ("default", "0")])
def test_nobody_dumps_core_unasked(root: Path, name: str, limit: str) -> None:
    import resource

    given = resource.getrlimit(resource.RLIMIT_CORE)
    if given[1] != resource.RLIM_INFINITY:
        pytest.skip("needs an unlimited hard limit on cores")
    resource.setrlimit(resource.RLIMIT_CORE, (given[1], given[1]))
    try:
        lines = console_of(root, "ulimit -c; ulimit -Hc", {"profile": name})
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, given)
    assert lines == [limit, "unlimited"]


PORTS = """
    cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range
    su -s /bin/sh tester -c 'httpd -h /tmp -p 80 && echo serves'
"""


@pytest.mark.parametrize("name", ["default", "off"])
def test_users_may_serve_any_port_and_ping(root: Path, name: str) -> None:
    """As in docker: an image whose server is not root's serves port 80."""
    assert console_of(root, PORTS, {"profile": name}) == ["0", "0\t2147483647", "serves"]


def test_strict_leaves_low_ports_to_root(root: Path) -> None:
    script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"
    assert console_of(root, script, {"profile": "strict"}) == ["1024", "1\t0"]


def test_what_the_config_says_of_ports_wins(root: Path) -> None:
    own = {"net.ipv4.ip_unprivileged_port_start": "443"}
    script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert console_of(root, script, {"sysctls": own}) == ["443"]


LIMITS = "awk '/Max (open files|processes)/ { print $(NF - 2), $(NF - 1) }' /proc/self/limits"


@pytest.mark.parametrize("given", [(1024, 4096), (512, 2**20), (4096, 4096)])
def test_limits_are_a_servers_as_far_as_the_hosts_go(root: Path, given: tuple[int, int]) -> None:
    import resource

    soft, hard = given
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip(f"needs a hard limit of {hard} descriptors")
    under = ["prlimit", f"--nofile={soft}:{hard}", "--nproc=5000:6000"]
    with Machine(root, boot_config(["sh", "-c", LIMITS]), under=under) as machine:
        machine.report("ready")
        assert machine.wait() == 0
        told = machine.console.split()
    assert told == ["6000", "6000", str(hard), str(hard)]


# ── the document ─────────────────────────────────────────────────────────────────────────────────


def documented() -> dict[str, str]:
    """Measures of the tables in docs/design/security.md, and the profile of each."""
    rows = re.findall(r"^\| (`.+?`) \|.*\| (default|strict) \|", DOCUMENT.read_text(), re.MULTILINE)
    return {name: where for names, where in rows for name in re.findall(r"`(.+?)`", names)}


@needs_guestsys
def test_every_measure_is_documented() -> None:
    from microguest.init_shim.hardening import profile as hardening

    expected = {f"{name}={value}": "default" for name, value in sysctls.DEFAULT.items()}
    expected |= {f"{name}={value}": "default" for name, value in sysctls.LOCKED_MODULES.items()}
    expected |= {f"{name}={value}": "strict" for name, value in sysctls.STRICT.items()}
    expected |= dict.fromkeys([*hardening.DEFAULT_MEASURES, "core-limit"], "default")
    expected |= dict.fromkeys(hardening.STRICT_MEASURES, "strict")
    assert documented() == expected


def test_every_servers_setting_is_documented() -> None:
    row = r"^\| `(.+?)` \|.*\| (all|all but strict) \|"
    rows = re.findall(row, DOCUMENT.read_text(), re.MULTILINE)
    assert dict(rows) == {
        f"{name}={value}": "all but strict" if name in sysctls.UNTRUSTING else "all"
        for name, value in sysctls.SERVERS.items()
    }
