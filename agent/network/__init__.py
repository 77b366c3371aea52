"""The network of a guest that runs."""
