"""Forward passes; routed experts come from an injected provider."""
