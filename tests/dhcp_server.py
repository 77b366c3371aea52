"""A DHCP server for tests, as good or bad as asked: `dhcp_server.py PID MODE…`, as root.

It runs in a network namespace of its own, makes a pair of veth of which the process PID gets one
end as eth0, serves on the other, and prints one JSON line for each message that it hears. Several
modes are taken one after the other, one for each DISCOVER.
"""

import json
import socket
import struct
import subprocess
import sys

SERVER = "10.9.0.1"
OFFERED = "10.9.0.77"
KINDS = {1: "discover", 3: "request", 7: "release"}
COOKIE = b"\x63\x82\x53\x63"
LEASE = 4  # seconds: renewed after 2


def main(pid: str, modes: list[str]) -> None:
    run("ip", "link", "add", "srv", "type", "veth", "peer", "name", "eth0", "netns", pid)
    run("ip", "addr", "add", f"{SERVER}/24", "dev", "srv")
    run("ip", "link", "set", "srv", "up")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"srv\0")
        server.bind(("", 67))
        serve(server, modes)


def serve(server: socket.socket, modes: list[str]) -> None:
    mode = ""
    heard = 0
    while True:
        request, (sender, _) = server.recvfrom(2048)
        kind = KINDS.get(options(request)[53][0], "other")
        print(json.dumps({"kind": kind, "from": sender, "ciaddr": request[12:16].hex(),
                          "name": options(request).get(12, b"").decode()}), flush=True)  # fmt: skip
        if kind == "discover":
            mode = modes.pop(0) if len(modes) > 1 else modes[0]
        heard += 1
        for answer in answers(mode, kind, request, heard):
            server.sendto(answer, (sender if sender != "0.0.0.0" else "255.255.255.255", 68))


def answers(mode: str, kind: str, request: bytes, heard: int) -> list[bytes]:
    """`heard` counts all messages, this one included."""
    good = reply(request, 2 if kind == "discover" else 5)
    match mode:
        case "silent":
            return []
        case "hostile":  # whatever it is, none of it may be taken
            short = [good[:size] for size in (0, 1, 239, 240, 243, 250)]
            wrong = [
                reply(request, 2, xid=b"\1\2\3\4"),
                reply(request, 2, address="127.0.0.1"),
                reply(request, 2, address="224.0.0.1"),
                reply(request, 2, address="0.0.0.0"),
                reply(request, 2, mask="255.0.255.0"),
                reply(request, 2, lease=0),
                reply(request, 99),
                reply(request, 2, cookie=b"\0\0\0\0"),
                reply(request, 2, chaddr=b"\2\0\0\0\0\1"),
                good[:240] + b"\x35\xff" + good[240:],  # an option longer than the message
                good[:240] + bytes(1400),
                good[:240] + b"\xff" * 9000,
            ]
            return short + wrong
        case "refuse":
            return [good if kind == "discover" else reply(request, 6)]
        case "forget" if request[12:16] != bytes(4):  # a lease that is to be renewed
            return [reply(request, 6)]
        case "moving-names":  # the name server is another one with each answer
            return [reply(request, good[242], dns=f"10.9.0.{heard}")]
        case "long":
            return [reply(request, good[242], lease=3600)]
        case "nasty-names":
            extra = option(15, b"evil\nnameserver 6.6.6.6")
            return [reply(request, good[242], extra=extra)]
        case "far-gateway":
            return [reply(request, good[242], mask="255.255.255.255", router="10.200.0.1")]
        case "classless":
            routes = bytes((24, 10, 50, 0, 10, 9, 0, 2, 0, 10, 9, 0, 3))
            return [reply(request, good[242], extra=option(121, routes) + option(26, b"\x05\x14"))]
    return [good]


def reply(
    request: bytes,
    kind: int,
    *,
    xid: bytes = b"",
    address: str = OFFERED,
    mask: str = "255.255.255.0",
    router: str = SERVER,
    dns: str = "10.9.0.53",
    lease: int = LEASE,
    cookie: bytes = COOKIE,
    chaddr: bytes = b"",
    extra: bytes = b"",
) -> bytes:
    head = b"\x02\x01\x06\x00" + (xid or request[4:8]) + bytes(4) + request[12:16]
    head += socket.inet_aton(address) + socket.inet_aton(SERVER) + bytes(4)
    head += (chaddr or request[28:34]).ljust(16, b"\0") + bytes(192) + cookie
    body = option(53, bytes((kind,))) + option(54, socket.inet_aton(SERVER))
    body += option(1, socket.inet_aton(mask)) + option(3, socket.inet_aton(router))
    body += option(6, socket.inet_aton(dns)) + option(51, struct.pack("!I", lease))
    if not extra:
        extra = option(15, b"lan.example")
    return head + body + extra + b"\xff"


def option(code: int, value: bytes) -> bytes:
    return bytes((code, len(value))) + value


def options(data: bytes) -> dict[int, bytes]:
    found, at = {}, 240
    while at < len(data) and data[at] != 255:
        found[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return found


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
