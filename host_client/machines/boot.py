"""Starting a machine, from the image to an agent that answers."""

import os
import threading
import time
from typing import Final, Protocol, Unpack

from microguest.guest.report import line_mark
from microguest.host_client import images
from microguest.host_client.errors import BootFailed, DeadlineExceeded, MachineError
from microguest.host_client.interrupts import interrupts_later
from microguest.host_client.log import DEBUG, INFO, note
from microguest.host_client.machines.bundle import Bundle, find_bundle
from microguest.host_client.machines.console import MARK_FILE
from microguest.host_client.machines.folder import STATE_VARIABLE, Folder, claim, sweep
from microguest.host_client.machines.machine import Machine
from microguest.host_client.machines.monitor_link import Link
from microguest.host_client.machines.namespaces import NamespacesBackend
from microguest.host_client.machines.plan import CONSOLE_SHOWN, MachineState, Plan, cut
from microguest.host_client.machines.prepare import Preparation
from microguest.host_client.machines.qemu import QemuBackend
from microguest.host_client.machines.settings import MachineOptions, Settings
from microguest.host_client.machines.workload import check_process, check_workload
from microguest.host_client.shortage import explain
from microguest.host_client.values import kind_of, path

__all__ = ["BACKENDS", "Backend", "boot", "start"]

ABANDONED_EVERY: Final = 0.05  # seconds between looks whether the boot was given up
MONITOR_ALLOWANCE: Final = 15.0  # seconds beyond the boot's own deadline, which the monitor keeps


class Backend(Protocol):
    """One kind of machine."""

    name: str

    def check(self, settings: Settings) -> None:
        """MachineError for what this host or this kind cannot do, before anything is made."""

    def plan(self, preparation: Preparation) -> Plan:
        """Prepare the run folder and say what the monitor shall start."""


BACKENDS: Final[dict[str, Backend]] = {
    backend.name: backend for backend in (QemuBackend(), NamespacesBackend())
}


def boot(
    image: str,
    *,
    bundle: str | os.PathLike[str] | None = None,
    progress: images.OnProgress | None = None,
    abandoned: threading.Event | None = None,
    **options: Unpack[MachineOptions],
) -> Machine:
    """Start a machine from an image and wait until its agent serves. Use it in a `with` block.

    image: oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME] or dir:ROOTFS, and
    @sha256:DIGEST behind all but the last (docs/design/images.md). bundle: folder of kernel and
    initramfs, instead of where they are looked for. options: MachineOptions says what there is.
    Making a disk of an image that is new here does not count for the `timeout`; `progress` is
    called with how far it is (`images.Progress`), and what it raises ends the making. abandoned:
    set by another thread, it gives the boot up, also one that has just come to its end, by a
    MachineError.

    Raises TypeError for an option of a wrong type, ImageError, MachineError, and BootFailed where
    the guest did not come up. Nothing is left behind then, nor after the end or death of this
    program.
    """
    if image is None:
        raise TypeError("image: expected a name as oci:DIR:TAG, got None")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable, got {kind_of(progress)}")
    if abandoned is not None and not hasattr(abandoned, "is_set"):
        raise TypeError(f"abandoned: expected a threading.Event, got {kind_of(abandoned)}")
    return start(
        Settings.of(image, options),
        bundle=None if bundle is None else path(bundle, "bundle"),
        progress=progress,
        abandoned=abandoned,
    )


def start(
    settings: Settings,
    *,
    bundle: str | None = None,
    progress: images.OnProgress | None = None,
    abandoned: threading.Event | None = None,
) -> Machine:
    """The machine of these settings, ready. Raises as `boot` does."""
    backend = BACKENDS.get(settings.machine)
    if backend is None:
        raise MachineError(f"machine {settings.machine!r:.40} is none of: {', '.join(BACKENDS)}")
    backend.check(settings)
    check_workload(settings)
    found = find_bundle(bundle)
    with images.open_image(settings.image) as image:  # also its name, before anything is made
        check_process(settings, image.config)
        return claimed(
            backend,
            settings,
            found,
            image,
            progress=progress,
            abandoned=abandoned or threading.Event(),
        )


def claimed(
    backend: Backend,
    settings: Settings,
    bundle: Bundle,
    image: images.Image,
    *,
    progress: images.OnProgress | None,
    abandoned: threading.Event,
) -> Machine:
    """The same with what had to be there found: takes the name and starts the monitor."""
    sweep()
    link: Link | None = None
    try:
        with interrupts_later():  # one between two of these lines would leave the folder behind
            folder = claim(settings.name)
            try:
                link = Link(folder)
            except BaseException:
                folder.remove()
                raise
        report = unless(abandoned, progress, folder.name)
        preparation = Preparation(settings, folder, bundle, image, new_token(), report)
        return bring_up(backend, preparation, link, abandoned)
    except BaseException:
        if link is not None:
            link.close()
        raise


def bring_up(
    backend: Backend, preparation: Preparation, link: Link, abandoned: threading.Event
) -> Machine:
    """Everything between the empty folder and the ready machine; the link's end undoes it."""
    settings, folder = preparation.settings, preparation.folder
    try:
        folder.write("token", preparation.token.encode())
        folder.write(MARK_FILE, line_mark(preparation.token).encode())
        plan = backend.plan(preparation)
        check_wanted(abandoned, folder.name)
        note(INFO, "machine %s: %s of %s", folder.name, settings.machine, settings.image)
        note(DEBUG, "machine %s: %s, vsock %s", folder.name, plan.argv[0], plan.vsock or "none")
        for share in plan.shares:
            note(DEBUG, "machine %s: %s by %s", folder.name, share.source, share.argv[0])
        link.send(plan)
        await_ready(link, folder, settings.timeout, abandoned)
    except OSError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        why = explain(error, folder.path, move=STATE_VARIABLE)
        raise MachineError(f"cannot prepare machine {folder.name}: {why}") from error
    check_wanted(abandoned, folder.name)
    return Machine(link, preparation.token)


def unless(
    abandoned: threading.Event, progress: images.OnProgress | None, name: str
) -> images.OnProgress:
    """`progress` that ends the making of a disk when the boot is given up."""

    last = ""

    def report(how_far: images.Progress) -> None:
        nonlocal last
        check_wanted(abandoned, name)
        if how_far.step != last:
            last = how_far.step
            note(INFO, "image %s: %s, %d bytes", how_far.image, last, how_far.total)
        if progress is not None:
            progress(how_far)

    return report


def check_wanted(abandoned: threading.Event, name: str) -> None:
    """MachineError where the boot was given up."""
    if abandoned.is_set():
        raise MachineError(f"machine {name} was given up while it was being started")


def await_ready(link: Link, folder: Folder, timeout: float, abandoned: threading.Event) -> None:
    """Until the guest has announced itself, or nobody wants it. BootFailed where it did not."""
    deadline = time.monotonic() + timeout + MONITOR_ALLOWANCE
    while not abandoned.is_set():
        left = max(0.0, deadline - time.monotonic())
        state = link.listen(min(left, ABANDONED_EVERY))
        ready = next((step for step in state.timeline if step.name == "ready"), None)
        if ready is not None:
            note(INFO, "machine %s: ready after %.0f ms", folder.name, ready.end_ms)
            return
        if state.ended or link.over:
            raise boot_failed(state, link.console())
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the monitor of machine {folder.name} does not answer", seconds=timeout
            )


def boot_failed(state: MachineState, console: str) -> BootFailed:
    """The error for a machine that ended before it was ready."""
    reason = state.error or "its monitor process died"
    report = state.boot_failed
    message = f"machine {state.name} did not come up: {reason}"
    if report is None:
        return BootFailed(message, console=cut(console, CONSOLE_SHOWN, tail=True))
    return BootFailed(
        message,
        step=report.step,
        syscall=report.syscall,
        path=report.path,
        errno=report.errno,
        console=cut(console, CONSOLE_SHOWN, tail=True),
    )


def new_token() -> str:
    """32 random bytes as hexadecimal digits."""
    import secrets

    return secrets.token_hex(32)
