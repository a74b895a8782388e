"""Generators of the demo model's training text; each module knows one domain."""
