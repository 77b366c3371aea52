"""The image's files about names: resolv.conf, hosts, hostname and machine-id in its /etc.

A file is written beside the old one and renamed over it, so that no program sees half of it. Every
path is resolved inside the image's root. Only what the config says is touched; docs/network.md
gives the rules and their reasons.
"""

import errno
import os
import stat

import _guestsys

from init_shim import mounts
from init_shim.failure import Failure, call
from init_shim.reporter import say

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["hosts_text", "name_host", "resolv_conf_text", "write"]

ETC = "/etc"
STORE = "/run/microguest/etc"  # where files lie that are mounted over a read-only root's
# linux/openat2.h
NO_MAGIC_LINKS, IN_ROOT = 0x02, 0x10
LONGEST_KEPT = 1024 * 1024  # bytes of an image's /etc/hosts; a larger one is left alone
OWN_ADDRESS = "127.0.1.1"  # of a host that has no other; Debian's convention
LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
"""


def write(name: str, text: str, mode: int = 0o644) -> None:
    """Make /etc/`name` a file with this text, owned by root. Raises Failure.

    A symlink is replaced, not followed. A file that is a mount of its own stays as it is. Where
    the root is read-only, the new file is mounted over the old one.
    """
    data = text.encode("utf-8", "surrogateescape")
    path = f"{ETC}/{name}"
    try:
        with call("open", path):
            folder = open_etc()
    except Failure as failure:
        if failure.errno != errno.EROFS:
            raise
        raise nowhere(path) from failure
    try:
        if has(folder, name, data, mode):
            return
        replace(folder, name, data, mode)
    except OSError as error:
        if error.errno == errno.EBUSY:
            say(f"{path} is a mount of its own and stays as it is")
        elif error.errno == errno.EROFS:
            cover(folder, name, data, mode)
        else:
            with call("write", path):
                raise
    finally:
        os.close(folder)


def open_etc() -> int:
    """An O_PATH descriptor of the image's /etc, which is made where it is missing. OSError."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            return open_inside(root, "etc", os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            os.mkdir("etc", 0o755, dir_fd=root)
            return open_inside(root, "etc", os.O_PATH | os.O_DIRECTORY)
    finally:
        os.close(root)


def open_inside(folder: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2(2) with PID 1's root as the end of every symlink and `..`."""
    return _guestsys.openat2(folder, path, flags | os.O_CLOEXEC, mode, NO_MAGIC_LINKS | IN_ROOT)


def has(folder: int, name: str, data: bytes, mode: int) -> bool:
    """Whether the file is just that already: then nothing is copied up or mounted for it."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                     dir_fd=folder)  # fmt: skip
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        same = stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) == mode
        return same and info.st_size == len(data) and os.read(fd, len(data) + 1) == data
    finally:
        os.close(fd)


def replace(folder: int, name: str, data: bytes, mode: int) -> None:
    """A new file under a name of its own, then renamed. Raises OSError, leaving nothing behind."""
    temporary = f".{name}.microguest"
    try:
        os.unlink(temporary, dir_fd=folder)
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        fill(fd, data, mode)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(temporary, dir_fd=folder)
        raise
    finally:
        os.close(fd)


def fill(fd: int, data: bytes, mode: int) -> None:
    """Write an empty file, then give it to root with this mode."""
    while data:
        data = data[os.write(fd, data) :]
    os.fchown(fd, 0, 0)  # a directory may pass its group on
    os.fchmod(fd, mode)


# ── a read-only root ─────────────────────────────────────────────────────────────────────────────


def cover(folder: int, name: str, data: bytes, mode: int) -> None:
    """Let /etc/`name` have this text where /etc cannot be written to. Raises Failure.

    A link that leads out of the read-only part (as into /run) is written through; a file has one
    from STORE mounted over it.
    """
    path = f"{ETC}/{name}"
    stored = f"{STORE}/{name}"
    if os.path.exists(stored):  # mounted already
        with call("write", stored):
            overwrite(os.open(stored, os.O_WRONLY | os.O_CLOEXEC), data, mode)
        return
    try:
        leads_to = os.readlink(name, dir_fd=folder)
    except OSError:
        leads_to = ""
    if leads_to and write_through(leads_to, data, mode):
        return
    try:
        target = open_inside(folder, name, os.O_PATH)
    except OSError:
        raise nowhere(path) from None
    try:
        with call("write", stored):
            os.makedirs(STORE, exist_ok=True)
            overwrite(os.open(stored, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), data, mode)
        mounts.mount(stored, f"/proc/self/fd/{target}", None, mounts.BIND)
    finally:
        os.close(target)


def write_through(leads_to: str, data: bytes, mode: int) -> bool:
    """Write the file that a symlink of /etc names; False where that cannot be written either."""
    try:
        overwrite(open_behind(leads_to), data, mode)
    except OSError:
        return False
    return True


def open_behind(leads_to: str) -> int:
    """The file that a symlink of /etc names, made with its directories. Raises OSError."""
    path = os.path.normpath(os.path.join(ETC, leads_to))
    *parents, _ = path.strip("/").split("/")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for depth in range(len(parents)):
            try:
                opened = open_inside(root, "/".join(parents[: depth + 1]), os.O_PATH)
                os.close(opened)
            except FileNotFoundError:
                parent = open_inside(root, "/".join(parents[:depth]) or ".", os.O_PATH)
                try:
                    os.mkdir(parents[depth], 0o755, dir_fd=parent)
                finally:
                    os.close(parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK
        return open_inside(root, path.lstrip("/"), flags, 0o600)
    finally:
        os.close(root)


def overwrite(fd: int, data: bytes, mode: int) -> None:
    """Give an open file other content, and close it. Raises OSError."""
    try:
        os.ftruncate(fd, 0)
        fill(fd, data, mode)
    finally:
        os.close(fd)


def nowhere(path: str) -> Failure:
    """What to tell of a read-only root that lacks the file."""
    return Failure(
        f"write {path}: the root is read-only and has no such file to mount over; have it in the "
        f"image, or {ETC} among root.writable",
        syscall="open",
        path=path,
        errno=errno.EROFS,
    )


# ── what is in them ──────────────────────────────────────────────────────────────────────────────


def resolv_conf_text(
    nameservers: "Sequence[str]", search: "Sequence[str]", options: "Sequence[str]"
) -> str:
    """resolv.conf(5)."""
    lines = [f"nameserver {address}" for address in nameservers]
    if search:
        lines.append(f"search {' '.join(search)}")
    if options:
        lines.append(f"options {' '.join(options)}")
    return "".join(f"{line}\n" for line in lines)


def hosts_text(hostname: str, address: str, hosts: "Mapping[str, Sequence[str]]") -> str:
    """A whole hosts(5): localhost, the host's own name at `address`, then what the config has."""
    text = LOCALHOST
    if hostname != "localhost":
        text += f"{address or OWN_ADDRESS}\t{own_names(hostname)}\n"
    return text + "".join(f"{at}\t{' '.join(names)}\n" for at, names in hosts.items())


def name_host(hostname: str, address: str) -> None:
    """Let the host's own name be found in /etc/hosts, whose other lines stay. Raises Failure."""
    text = read_hosts()
    if len(text) > LONGEST_KEPT:
        return
    names = {word for line in text.splitlines() for word in line.partition("#")[0].split()[1:]}
    if hostname in names:
        return
    if not names:
        write("hosts", hosts_text(hostname, address, {}))
        return
    line = f"{address or OWN_ADDRESS}\t{own_names(hostname)}\n"
    if "\n" not in text[-1:]:
        text += "\n"
    write("hosts", text + line)


def read_hosts() -> str:
    """The image's /etc/hosts, cut after LONGEST_KEPT + 1 bytes; "" where it has none."""
    try:
        folder = open_etc()
        try:
            fd = open_inside(folder, "hosts", os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.close(folder)
        with open(fd, "rb", buffering=0) as file:
            data = file.read(LONGEST_KEPT + 1) or b""
    except OSError:
        return ""
    return data.decode("utf-8", "surrogateescape")


def own_names(hostname: str) -> str:
    """A name with dots is found by its first part too."""
    short = hostname.partition(".")[0]
    return hostname if short in ("", hostname) else f"{hostname} {short}"
