"""Talking to an agent: from the URL to a process's streams."""
