"""Knows which tokens of one conversation are in the KV cache, and what of them a prompt keeps."""

from moecli.models.text_decoder import SequenceCache
from moecli.prompt import Placed, Prompt, first_difference


class Session:
    """One sequence: its KV cache and the tokens in it."""

    def __init__(self, cache: SequenceCache) -> None:
        self.cache = cache
        self.tokens: list[int] = []  # exactly what the KV cache holds
        # Of the newest prompt: what of them is at positions of the tokens is in the KV cache.
        self.pictures: tuple[Placed, ...] = ()

    def reset(self) -> None:
        """Forget everything."""
        self.cache.truncate(0)
        self.tokens.clear()
        self.pictures = ()

    def rewind(self, prompt: Prompt) -> int:
        """Keep the common prefix with `prompt`, less one token so that there is one to feed.

        The tokens of two pictures can be the same: the prefix ends where another picture begins.
        Returns how many tokens stay; a ring cache may keep fewer than the common prefix.
        """
        del self.tokens[self.cache.length :]  # a step that failed may have cost some of them
        common = 0
        for ours, theirs in zip(self.tokens, prompt.token_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        other = first_difference(self.pictures, prompt.pictures)
        common = common if other is None else min(common, other)
        self.pictures = prompt.pictures
        if common < len(self.tokens):
            common = self.cache.truncate(common)
            del self.tokens[common:]
        return common
