"""Files that a person names on the command line."""

from microguest.host_client.errors import MachineError
from microguest.host_client.shortage import explain

__all__ = ["read_named"]


def read_named(path: str, what: str, most: int) -> bytes:
    """All of a file of at most so many bytes, whole MiB; what: what it is. MachineError."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise MachineError(f"cannot read the {what} {explain(error, path)}") from error
    if len(data) > most:
        raise MachineError(f"the {what} {path} has more than {most >> 20} MiB")
    return data
