"""The device by itself: `python -m microguest.host_client.vhost_vsock`, for a QEMU by hand.

Listens on a path for QEMU (`-chardev socket,id=vs,path=...`), serves one machine, and ends with it.
"""

import argparse
import os
import select
import signal
import socket
import sys

from microguest.host_client.vhost_vsock import EventLoop, VsockDevice, unix_dialer

_DRAIN = 5.0


def main() -> int:
    """Serve one machine; 0 when QEMU left, 1 when the device had to give up."""
    parser = argparse.ArgumentParser(
        prog="python -m microguest.host_client.vhost_vsock", description=__doc__
    )
    parser.add_argument("--control", required=True, help="Unix socket that QEMU connects to")
    parser.add_argument("--hybrid", required=True, help="Unix socket for CONNECT; guests reach _P")
    parser.add_argument("--cid", type=int, default=3, help="the guest's CID (default 3)")
    parser.add_argument("--window", type=int, default=256, help="KiB of credit per connection")
    options = parser.parse_args()
    loop = EventLoop()
    hybrid = _listen(options.hybrid)
    with _listen(options.control) as listener:
        control, _address = listener.accept()
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        device.drain(loop.stop, _DRAIN)

    device = VsockDevice(
        loop,
        guest_cid=options.cid,
        control=control,
        hybrid_listener=hybrid,
        connect_to_host=unix_dialer(options.hybrid),
        on_failure=failed,
        window=options.window * 1024,
    )
    qemu = os.pidfd_open(_peer_pid(control))
    loop.add(qemu, lambda _events: device.drain(loop.stop, _DRAIN), select.EPOLLIN | select.EPOLLET)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    loop.run()
    device.close()
    for reason in failures:
        print(reason, file=sys.stderr)
    return 1 if failures else 0


def _peer_pid(control: socket.socket) -> int:
    credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], sys.byteorder)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(128)
    return listener


if __name__ == "__main__":
    sys.exit(main())
