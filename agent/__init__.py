"""The service in the guest: a trio program that serves the protocol's operations."""
