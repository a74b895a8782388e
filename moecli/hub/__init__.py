"""Knows the model hub: repositories, downloads, and the cache that all of its tools share."""
