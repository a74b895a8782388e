"""The cases of the self-check: each fast path beside a plain computation."""
