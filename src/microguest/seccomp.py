"""Filters of system calls for processes in a guest, from names or a profile."""

from microguest.host_client.seccomp.profile import PRIVILEGED, deny, names, profile

__all__ = ["PRIVILEGED", "deny", "names", "profile"]
