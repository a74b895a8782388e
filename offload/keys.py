"""Knows how an expert is named: by the index of its decoder layer and its number there."""

ExpertKey = tuple[int, int]


def describe(key: ExpertKey) -> str:
    """The name of an expert in messages."""
    return f"expert {key[1]} of layer {key[0]}"
