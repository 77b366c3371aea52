"""Every error, as one tree.

MicroguestError
├── ConnectError              nobody answered at the URL, or refused before the protocol began
├── ConnectionLost            the agent or its machine went away during an operation
├── DeadlineExceeded          an operation did not finish in the time that its caller gave
├── CommandFailed             a command ended with another status than 0 (only where asked)
├── OutputTooLarge            a command wrote more than the caller wants to hold in memory
├── OutputStalled             a process cannot go on until its caller reads its other output
├── OperationError            the agent answered "no": code, message, fields
│   ├── Unauthorized          the token is not this machine's
│   ├── NotReady              the guest's root is not in place yet
│   ├── TooBusy               it has as many connections as it serves
│   ├── ShuttingDown          the machine is ending
│   ├── NoSuchProcess         nothing has that id, or it is not kept
│   ├── IdTaken               a process has the id that a start has chosen
│   ├── StdinTaken            another connection may write to the process
│   └── StartError            the process was never started: step and errno
│       └── ProgramNotFound   there is no such program in the image
├── ProtocolError             the connection cannot be used any more
│   ├── LocalProtocolError    this side used the protocol wrongly
│   └── RemoteProtocolError   the agent did
├── BootConfigError           a boot config that cannot be used
├── ManifestError             a guest bundle whose manifest.json cannot be used
├── ImageError                an image that is missing, broken or cannot be made bootable
└── MachineError              a machine that cannot be started, found or stopped
    └── BootFailed            the guest said why it did not come up, or died before it could

Each survives pickle and copy with all of its fields.
"""

from microguest.host_client.client.result import (
    CommandFailed,
)
from microguest.host_client.errors import (
    BootConfigError,
    BootFailed,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    IdTaken,
    ImageError,
    LocalProtocolError,
    MachineError,
    ManifestError,
    MicroguestError,
    NoSuchProcess,
    NotReady,
    OperationError,
    OutputStalled,
    OutputTooLarge,
    ProgramNotFound,
    ProtocolError,
    RemoteProtocolError,
    ShuttingDown,
    StartError,
    StdinTaken,
    TooBusy,
    Unauthorized,
)

__all__ = [
    "BootConfigError",
    "BootFailed",
    "CommandFailed",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "IdTaken",
    "ImageError",
    "LocalProtocolError",
    "MachineError",
    "ManifestError",
    "MicroguestError",
    "NoSuchProcess",
    "NotReady",
    "OperationError",
    "OutputStalled",
    "OutputTooLarge",
    "ProgramNotFound",
    "ProtocolError",
    "RemoteProtocolError",
    "ShuttingDown",
    "StartError",
    "StdinTaken",
    "TooBusy",
    "Unauthorized",
]
