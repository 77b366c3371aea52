"""Takes the place of trio's DTLS in the frozen guest, which has no OpenSSL (stdlib/ssl.py).

The original defines a dozen attrs classes at import, a twentieth of the agent's start, for objects
that could not be used.
"""


class DTLSChannel:
    """A name that trio exports."""


class DTLSChannelStatistics:
    """A name that trio exports."""


class DTLSEndpoint:
    """Refuses, as trio does without pyOpenSSL."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        raise RuntimeError("the frozen guest has no TLS, so it has no DTLS either")
