"""What host and agent say to each other: frames, records, and the protocol's state machine."""
