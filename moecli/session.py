"""Knows which tokens of one conversation are in the KV cache, and what of them a prompt keeps."""

from moecli.models.text_decoder import SequenceCache


class Session:
    """One sequence: its KV cache and the tokens in it."""

    def __init__(self, cache: SequenceCache) -> None:
        self.cache = cache
        self.tokens: list[int] = []  # exactly what the KV cache holds

    def reset(self) -> None:
        """Forget everything."""
        self.cache.truncate(0)
        self.tokens.clear()

    def rewind(self, token_ids: list[int]) -> int:
        """Keep the common prefix with `token_ids`, less one token so that there is one to feed.

        Returns how many tokens stay; a ring cache may keep fewer than the common prefix.
        """
        del self.tokens[self.cache.length :]  # a step that failed may have cost some of them
        common = 0
        for ours, theirs in zip(self.tokens, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self.tokens):
            common = self.cache.truncate(common)
            del self.tokens[common:]
        return common
