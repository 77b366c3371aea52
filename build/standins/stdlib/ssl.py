"""Takes the place of the standard library's ssl in the frozen guest.

There is no OpenSSL in the binary: the wire is vsock, whose ends are the host and this guest. trio
imports ssl without asking, and names these classes in except clauses and annotations. Anything else
is an AttributeError that says why.
"""


class SSLError(OSError):
    """Base of ssl's errors."""


class CertificateError(SSLError, ValueError):
    """Never raised here; caught by trio."""


class SSLEOFError(SSLError):
    """Never raised here; caught by trio."""


class SSLSyscallError(SSLError):
    """Never raised here; caught by trio."""


class SSLWantReadError(SSLError):
    """Never raised here; caught by trio."""


def __getattr__(name: str) -> object:
    raise AttributeError(f"ssl.{name}: the frozen guest has no TLS")
