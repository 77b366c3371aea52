"""The host's side: connect to an agent, boot machines, run programs in them."""

__all__: list[str] = []
