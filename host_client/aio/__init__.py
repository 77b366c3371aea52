"""The awaiting face, over anyio. What is public of it is `microguest.aio`'s."""
