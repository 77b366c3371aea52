"""The network that the machine comes up with."""
