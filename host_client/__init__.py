"""The host's side: connect to an agent, boot machines. What is public of it is `microguest`'s."""
