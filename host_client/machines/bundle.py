"""Where the guest's kernel, initramfs and program are on this host."""

import os
from dataclasses import dataclass

from microguest.guest.bundle.manifest import INITRAMFS, KERNEL, MANIFEST, PROGRAM, Manifest
from microguest.guest.errors import ManifestError
from microguest.host_client.errors import MachineError
from microguest.host_client.ownership import trusted_folder_problem
from microguest.host_client.shortage import explain

__all__ = ["Bundle", "candidates", "find_bundle"]

MANIFEST_MAX = 1024 * 1024  # bytes
HASH_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are there and have the size that its manifest says."""

    folder: str
    manifest: Manifest

    @property
    def kernel(self) -> str:
        """Path of the kernel."""
        return os.path.join(self.folder, KERNEL)

    @property
    def initramfs(self) -> str:
        """Path of the initramfs, without a boot config."""
        return os.path.join(self.folder, INITRAMFS)

    @property
    def program(self) -> str:
        """Path of the program that is PID 1 and agent."""
        return os.path.join(self.folder, PROGRAM)

    def verify(self) -> None:
        """Check every file's SHA-256. MachineError for the first that is another."""
        import hashlib

        again = how_to_get(self.folder)
        for name, record in self.manifest.files.items():
            path = os.path.join(self.folder, name)
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(HASH_CHUNK):
                    digest.update(chunk)
            if digest.hexdigest() != record.sha256:
                raise MachineError(f"{path} is not what {MANIFEST} says: {again}")


def candidates(arch: str) -> list[str]:
    """Where a bundle is looked for, in order."""
    if chosen := os.environ.get("MICROGUEST_BUNDLE", ""):
        return [chosen]
    project = checkout()
    built = [] if project is None else [os.path.join(project, "dist", "guest", arch)]
    return [*built, data_folder(arch)]


def data_folder(arch: str) -> str:
    """Where this user's bundle is, if nobody says otherwise."""
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):
        data = os.path.expanduser("~/.local/share")
    return os.path.join(data, "microguest", "guest", arch)


def checkout() -> str | None:
    """The project's folder, if this package is used from there; None in an installed wheel.

    There the package that is imported has links to it.
    """
    project = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    return project if os.path.exists(os.path.join(project, "build", "make.py")) else None


def how_to_get(place: str) -> str:
    """What makes a bundle at `place`, or puts it there, for the end of an error message."""
    if checkout() is not None and not os.environ.get("MICROGUEST_BUNDLE"):
        return "build it with `make guest`, or set MICROGUEST_BUNDLE to the folder of another"
    return (
        f"copy one to {place}, or set MICROGUEST_BUNDLE to the folder of one; `make guest` in a "
        f"checkout of the project makes it, as dist/guest/{os.uname().machine}"
    )


def find_bundle(folder: str | None = None) -> Bundle:
    """The bundle in `folder`, else this architecture's. MachineError says where it is not."""
    places = [folder] if folder is not None else candidates(os.uname().machine)
    for place in places:
        path = os.path.join(place, MANIFEST)
        try:
            with open(path, "rb") as file:
                manifest = Manifest.from_json(file.read(MANIFEST_MAX))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MachineError(f"the guest bundle cannot be used: {explain(error)}") from error
        except ManifestError as error:
            raise MachineError(f"the guest bundle {place} cannot be used: {error}") from error
        if folder is None and place == data_folder(os.uname().machine):
            _check_owner(place)
        _check_sizes(place, manifest)
        return Bundle(place, manifest)
    raise MachineError(f"no guest bundle in {' or '.join(places)}: {how_to_get(places[-1])}")


def _check_owner(folder: str) -> None:
    """Its program is run with our rights. One that was named is its namer's choice."""
    if problem := trusted_folder_problem(folder):
        raise MachineError(
            f"the guest bundle {folder} is not to be trusted: {problem}; give it to its user or to "
            "root alone, or name the folder of a bundle by MICROGUEST_BUNDLE"
        )


def _check_sizes(folder: str, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = os.path.join(folder, name)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise MachineError(f"guest bundle: {explain(error)}") from error
        if size != record.size:
            raise MachineError(
                f"guest bundle: {path} has {size} bytes, {MANIFEST} says {record.size}: "
                f"{how_to_get(folder)}"
            )
