"""PID 1 of the guest: mounts, modules, root, supervision, power-off. Standard library only."""
