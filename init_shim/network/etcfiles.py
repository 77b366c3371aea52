"""The image's files about names: resolv.conf, hosts, hostname and machine-id in its /etc.

A file is written beside the old one and renamed over it, so that no program sees half of it. Every
path is resolved inside the image's root. Only what the config says is touched;
docs/design/network.md gives the rules and their reasons.
"""

import errno
import os
import stat

from microguest.init_shim import mounts
from microguest.init_shim.confined import Opened, RootFolder
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.reporter import leave_out, say

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["hosts_text", "name_host", "name_there", "resolv_conf_text", "write"]

ETC = "/etc"
OWN = "/run/microguest"  # a tmpfs: /run may be anybody's in an image, what is mounted is not moved
STORE = f"{OWN}/etc"  # where files lie that are mounted over those of a root that takes none
STORE_SIZE = "4m"  # holds the image's longest hosts file, and the few others
LONGEST_KEPT = 1024 * 1024  # bytes of an image's /etc/hosts; a larger one is left alone
LONGEST_NAME = 256  # bytes of an image's /etc/hostname that is looked at
OWN_ADDRESS = "127.0.1.1"  # of a host that has no other; Debian's convention
LOCALHOST = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
"""


def write(name: str, text: str, mode: int = 0o644) -> None:
    """Make /etc/`name` a file with this text, owned by root. Raises nothing.

    A symlink is replaced, not followed. A file that is a mount of its own stays as it is. Where
    /etc does not take it (a full or read-only root, chattr(1)'s +i, a directory of that name), the
    new file is mounted over the old one; where that cannot be either, it is said: nobody shall be
    locked out of a machine by what was done inside.
    """
    try:
        put(name, text.encode("utf-8", "surrogateescape"), mode)
    except NotTaken as failure:
        leave_out(f"{ETC}/{name} is not as the machine was told: {failure}")


class NotTaken(Failure):
    """/etc does not take the file, and there is nothing to mount over."""


def put(name: str, data: bytes, mode: int) -> None:
    path = f"{ETC}/{name}"
    with RootFolder("/") as root, open_etc(root) as etc:
        try:
            if not has(etc.fd, name, data, mode):
                replace(etc.fd, name, data, mode)
        except OSError as error:
            if error.errno == errno.EBUSY:
                say(f"{path} is a mount of its own and stays as it is")
                return
            try:
                cover(root, etc, name, data, mode)
            except Failure as failure:
                why = f"{os.strerror(error.errno or 0)}; {failure.message}"
                raise NotTaken(why) from None


def open_etc(root: RootFolder) -> Opened:
    """The image's /etc, which is made where it is missing. Raises NotTaken."""
    try:
        return root.open_target(ETC, directory=True, create=True)
    except Failure as failure:
        raise NotTaken(failure.message) from None


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
        try:
            os.unlink(temporary, dir_fd=folder)
        except OSError:
            pass  # the first error says more
        raise
    finally:
        os.close(fd)


def fill(fd: int, data: bytes, mode: int) -> None:
    """Write an empty file, then give it to root with this mode."""
    while data:
        data = data[os.write(fd, data) :]
    os.fchown(fd, 0, 0)  # a directory may pass its group on
    os.fchmod(fd, mode)


# ── a root that takes nothing ────────────────────────────────────────────────────────────────────


def cover(root: RootFolder, etc: Opened, name: str, data: bytes, mode: int) -> None:
    """Let /etc/`name` have this text where /etc takes no file. Raises Failure.

    A link that leads to another file system (as into /run) is written through; a file has one from
    STORE mounted over it, and where none is there, an empty one is made for it, which often takes
    no space.
    """
    stored = f"{STORE}/{name}"
    if has_store() and os.path.exists(stored):  # mounted already
        with call("write", stored):
            overwrite(stored, data, mode)
    elif not write_through(root, etc, name, data, mode):
        with root.open_target(f"{ETC}/{name}", directory=False, create=True) as target:
            make_store()
            with call("write", stored):
                overwrite(stored, data, mode)
            mounts.mount(stored, target.path, None, mounts.BIND)


def has_store() -> bool:
    """Whether OWN is the tmpfs that `make_store` makes: nobody but root can have mounted one."""
    with call("open", "/proc/self/mounts"):
        lines = mounts.mount_table()
    return any(line.split(b" ")[1:3] == [OWN.encode(), b"tmpfs"] for line in lines)


def make_store() -> None:
    """A small tmpfs that only root can write to, with STORE in it. Raises Failure."""
    if has_store():
        return
    mounts.ensure_directory(OWN)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with call("open", OWN), Opened(os.open(OWN, flags)) as place:
        options = f"mode=0755,size={STORE_SIZE}"
        mounts.mount("tmpfs", place.path, "tmpfs", mounts.NOSUID | mounts.NODEV, options)
    with call("mkdir", STORE):
        os.mkdir(STORE, 0o755)


def write_through(root: RootFolder, etc: Opened, name: str, data: bytes, mode: int) -> bool:
    """Write the file that a symlink leads to, made with its directories; False if it cannot be.

    Only through links that are root's, as programs of the image may run by now.
    Not one of the same file system: that takes nothing either, and would lose what it has.
    """
    try:
        os.readlink(name, dir_fd=etc.fd)  # OSError: it is none
        with root.open_trusted(f"{ETC}/{name}", make="file") as target:
            info = os.fstat(target.fd)
            if not stat.S_ISREG(info.st_mode) or info.st_dev == os.fstat(etc.fd).st_dev:
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


def name_host(hostname: str, address: str, earlier: str) -> None:
    """Let the host's own name be found in /etc/hosts, whose other lines stay. Raises Failure.

    `earlier`: what the host was called before, "" if that is not known; its line goes.
    """
    text = read_text("hosts")
    if text is None:
        return
    lines = text.splitlines(keepends=True)
    if earlier != hostname:
        lines = [line for line in lines if not is_own_line(line, earlier)]
    names = {word for line in lines for word in line.partition("#")[0].split()[1:]}
    if not names:
        write("hosts", hosts_text(hostname, address, {}))
        return
    if hostname not in names:
        if "\n" not in lines[-1][-1:]:
            lines[-1] += "\n"
        lines.append(f"{address or OWN_ADDRESS}\t{own_names(hostname)}\n")
    if lines != text.splitlines(keepends=True):
        write("hosts", "".join(lines))


def is_own_line(line: str, hostname: str) -> bool:
    """Whether it is as `name_host` has written it for a host of this name."""
    at, _, names = line.rstrip("\n").partition("\t")
    return bool(hostname) and names == own_names(hostname) and at not in ("127.0.0.1", "::1")


def name_there() -> str:
    """What /etc/hostname says; "" where that is nothing that a host could be called."""
    return (read_text("hostname", LONGEST_NAME) or "").strip()


def read_text(name: str, longest: int = LONGEST_KEPT) -> str | None:
    """The image's /etc/`name`; "" where it has no such file, None where that is too large."""
    try:
        with RootFolder("/") as root:
            data = root.read(f"{ETC}/{name}", longest)
    except OSError as error:
        return None if error.errno == errno.EFBIG else ""
    return data.decode("utf-8", "surrogateescape")


def own_names(hostname: str) -> str:
    """A name with dots is found by its first part too."""
    short = hostname.partition(".")[0]
    return hostname if short in ("", hostname) else f"{hostname} {short}"
