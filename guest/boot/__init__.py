"""What a machine is told at its start: the boot config and its parts."""
