"""The root file system: put together, written out at the end."""
