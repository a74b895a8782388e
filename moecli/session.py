"""Knows which tokens of one conversation are in the KV cache, and what of them a new prompt can keep."""

from moecli.kv_cache import KvCache


class Session:
    """One sequence: its KV cache, the tokens in it, and the text they stand for."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.tokens: list[int] = []  # exactly what the KV cache holds
        self.text: str | None = None  # what `tokens` decode to; None when not known

    def reset(self) -> None:
        """Forget everything."""
        self.cache.truncate(0)
        self.tokens.clear()
        self.text = None

    def rewind(self, token_ids: list[int]) -> int:
        """Keep the common prefix with `token_ids`, less one token so that there is one to feed.

        Returns how many tokens stay; a ring cache may keep fewer than the common prefix.
        """
        common = 0
        for ours, theirs in zip(self.tokens, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(self.tokens):
            common = self.cache.truncate(common)
            del self.tokens[common:]
            self.text = None
        return common
