"""Debian's archive through the machine's own mirror, with a private apt configuration.

The machine's configuration says which mirror to use; nothing of it is changed. The private one asks
that mirror for one suite's index and trusts only the archive's keyring. Used for CPython's source
and for the kernel. Nothing here knows what is inside the packages.
"""

import glob
import os
from dataclasses import dataclass

from stages import BuildError, run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# How the paths of the two archives end, on every mirror.
MAIN_ARCHIVE = "/debian"
SECURITY_ARCHIVE = "/debian-security"


@dataclass(frozen=True, kw_only=True)
class PrivateApt:
    """An apt configuration below `folder`, with the index of one suite."""

    folder: str
    options: tuple[str, ...]

    def get(self, *arguments: str) -> None:
        """`apt-get` with this configuration, in `folder`. Raises BuildError."""
        run(["apt-get", *self.options, *arguments], cwd=self.folder)

    def real_package(self, name: str) -> str:
        """The package that the meta package `name` depends on first. Raises BuildError."""
        listing = run(["apt-cache", *self.options, "depends", "--important", name])
        for line in listing.splitlines():
            relation, _, package = line.strip().partition(" ")
            if relation == "Depends:":
                return package
        raise BuildError(f"{name} depends on no package; apt-cache said: {listing!r}")

    def only_file(self, suffix: str) -> str:
        """The path of the one downloaded file that ends in `suffix`. Raises BuildError."""
        found = glob.glob(os.path.join(self.folder, "*" + suffix))
        if len(found) != 1:
            raise BuildError(f"expected one *{suffix} from apt-get, got {found}")
        return found[0]


def private_apt(
    folder: str, *, kind: str, suite: str, architecture: str, security: bool = False
) -> PrivateApt:
    """Set up apt below `folder` for `suite` and fetch its index; `security` adds its updates.

    `kind` is "deb" or "deb-src"; `architecture` is Debian's name. Raises BuildError where the
    machine has no Debian mirror configured or it cannot be reached.
    """
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        os.makedirs(os.path.join(folder, name))
    if not os.path.exists(KEYRING):
        raise BuildError(f"no {KEYRING}; install the package debian-archive-keyring")
    entry = f"{kind} [signed-by={KEYRING}]"
    lines = [f"{entry} {machine_mirror(MAIN_ARCHIVE)} {suite} main\n"]
    if security:
        lines.append(f"{entry} {machine_mirror(SECURITY_ARCHIVE)} {suite}-security main\n")
    sources = os.path.join(folder, "sources.list")
    with open(sources, "w", encoding="utf-8") as file:
        file.writelines(lines)
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": os.path.join(folder, "parts"),
        "Dir::Etc::preferencesparts": os.path.join(folder, "parts"),
        "Dir::State::lists": os.path.join(folder, "lists"),
        "Dir::Cache": os.path.join(folder, "cache"),
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",  # the unprivileged _apt may not enter our folder
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    options = tuple(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))
    apt = PrivateApt(folder=folder, options=options)
    apt.get("update")
    return apt


def machine_mirror(archive: str) -> str:
    """The URL of an archive in this machine's apt configuration: the first entry whose path ends in
    `archive` and that lists the component main. Raises BuildError."""
    for path in sorted(glob.glob("/etc/apt/sources.list.d/*.sources")):
        with open(path, encoding="utf-8") as file:
            mirror = mirror_in_stanzas(file.read(), archive)
        if mirror:
            return mirror
    for path in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*.list"))]:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                mirror = mirror_in_lines(file.read(), archive)
            if mirror:
                return mirror
    raise BuildError(
        f"this machine's apt configuration names no Debian archive ({archive}); give CPython's "
        "source in MICROGUEST_CPYTHON_SOURCE and a kernel package in MICROGUEST_KERNEL_PACKAGE"
    )


def mirror_in_stanzas(text: str, archive: str) -> str | None:
    """The URL ending in `archive` in a deb822 file's text (sources.list(5)), or None."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            name, colon, value = line.partition(":")
            if colon and not line.startswith((" ", "\t", "#")):
                fields[name.strip().lower()] = value.strip()
        if fields.get("enabled", "yes") == "no" or "main" not in fields.get("components", ""):
            continue
        for uri in fields.get("uris", "").split():
            if uri.rstrip("/").endswith(archive):
                return uri
    return None


def mirror_in_lines(text: str, archive: str) -> str | None:
    """The URL ending in `archive` in a one-line-style file's text (sources.list(5)), or None."""
    for line in text.splitlines():
        words = line.partition("#")[0].replace("[", " [ ").replace("]", " ] ").split()
        if not words or words[0] not in {"deb", "deb-src"}:
            continue
        if "[" in words and "]" in words:
            words = [words[0], *words[words.index("]") + 1 :]]
        if len(words) > 3 and "main" in words[3:] and words[1].rstrip("/").endswith(archive):
            return words[1]
    return None
