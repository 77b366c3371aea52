"""A vhost-user vsock device in plain Python, for hosts without the kernel's vhost_vsock.

QEMU speaks vhost-user to it over a socketpair, host programs dial in over a Unix socket with
Firecracker's `CONNECT <port>` line. Needs no root, no kernel module and nothing outside the
standard library. `docs/design/vsock-device.md` has the design, the limits and the measurements.
"""

from microguest.host_client.event_loop import EventLoop, Timer
from microguest.host_client.vhost_vsock.device import VsockDevice
from microguest.host_client.vhost_vsock.hybrid import unix_dialer

__all__ = ["EventLoop", "Timer", "VsockDevice", "unix_dialer"]
