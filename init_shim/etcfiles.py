"""The image's files about names: resolv.conf, hosts, hostname and machine-id in its /etc.

A file is written beside the old one and renamed over it, so that no program sees half of it. Every
path is resolved inside the image's root. Only what the config says is touched; docs/network.md
gives the rules and their reasons.
"""

import errno
import os
import stat

from init_shim import mounts
from init_shim.confined import Opened, RootFolder
from init_shim.failure import Failure, call
from init_shim.reporter import say

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["hosts_text", "name_host", "resolv_conf_text", "write"]

ETC = "/etc"
STORE = "/run/microguest/etc"  # where files lie that are mounted over a read-only root's
LONGEST_KEPT = 1024 * 1024  # bytes of an image's /etc/hosts; a larger one is left alone
OWN_ADDRESS = "127.0.1.1"  # of a host that has no other; Debian's convention
LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
"""


def write(name: str, text: str, mode: int = 0o644, *, required: bool = True) -> None:
    """Make /etc/`name` a file with this text, owned by root. Raises Failure.

    A symlink is replaced, not followed. A file that is a mount of its own stays as it is. Where
    the root is read-only, the new file is mounted over the old one; where there is none, that is
    only said if the file is not `required`.
    """
    try:
        put(name, text.encode("utf-8", "surrogateescape"), mode)
    except Failure as failure:
        if required or failure.errno != errno.EROFS:
            raise
        say(failure.message)


def put(name: str, data: bytes, mode: int) -> None:
    path = f"{ETC}/{name}"
    with RootFolder("/") as root, open_etc(root, path) as etc:
        try:
            if not has(etc.fd, name, data, mode):
                replace(etc.fd, name, data, mode)
        except OSError as error:
            if error.errno == errno.EBUSY:
                say(f"{path} is a mount of its own and stays as it is")
            elif error.errno == errno.EROFS:
                cover(root, etc, name, data, mode)
            else:
                with call("write", path):
                    raise


def open_etc(root: RootFolder, path: str) -> Opened:
    """The image's /etc, which is made where it is missing. Raises Failure for `path` in it."""
    try:
        return root.open_target(ETC, directory=True, create=True)
    except Failure as failure:
        if failure.errno == errno.EROFS:
            raise nowhere(path) from None
        raise


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


def cover(root: RootFolder, etc: Opened, name: str, data: bytes, mode: int) -> None:
    """Let /etc/`name` have this text where /etc cannot be written to. Raises Failure.

    A link that leads out of the read-only part (as into /run) is written through; a file has one
    from STORE mounted over it.
    """
    path = f"{ETC}/{name}"
    stored = f"{STORE}/{name}"
    if os.path.exists(stored):  # mounted already
        with call("write", stored):
            overwrite(stored, data, mode)
        return
    if write_through(root, etc, name, data, mode):
        return
    try:
        target = root.resolve(path)
    except OSError:
        raise nowhere(path) from None
    with target:
        with call("write", stored):
            os.makedirs(STORE, exist_ok=True)
            overwrite(stored, data, mode)
        mounts.mount(stored, target.path, None, mounts.BIND)


def write_through(root: RootFolder, etc: Opened, name: str, data: bytes, mode: int) -> bool:
    """Write the file that a symlink leads to, made with its directories; False if it cannot be."""
    try:
        leads_to = os.readlink(name, dir_fd=etc.fd)
        place = os.path.normpath(os.path.join(ETC, leads_to))
        with root.open_target(place, directory=False, create=True) as target:
            if not stat.S_ISREG(os.fstat(target.fd).st_mode):
                return False  # /dev/null, say
            overwrite(target.path, data, mode)
    except (OSError, Failure):
        return False
    return True


def overwrite(path: str, data: bytes, mode: int) -> None:
    """Give a file this content in place, made if it is missing. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
    with Opened(os.open(path, flags, 0o600)) as file:
        fill(file.fd, data, mode)


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
        write("hosts", hosts_text(hostname, address, {}), required=False)
        return
    line = f"{address or OWN_ADDRESS}\t{own_names(hostname)}\n"
    if "\n" not in text[-1:]:
        text += "\n"
    write("hosts", text + line, required=False)


def read_hosts() -> str:
    """The image's /etc/hosts, cut after LONGEST_KEPT + 1 bytes; "" where it has none."""
    try:
        with RootFolder("/") as root, root.resolve(f"{ETC}/hosts") as found:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            with Opened(os.open(found.path, flags)) as file:
                data = os.read(file.fd, LONGEST_KEPT + 1)
    except OSError:
        return ""
    return data.decode("utf-8", "surrogateescape")


def own_names(hostname: str) -> str:
    """A name with dots is found by its first part too."""
    short = hostname.partition(".")[0]
    return hostname if short in ("", hostname) else f"{hostname} {short}"
