"""The implementations.  Each backend module has the same verbs on plain tensors, without autograd.

The verbs are those of `resfuse.backends.reference`, whose docstrings specify them for all.  Beside them a backend has
`unavailable_reason() -> str | None` (this machine) and `unsupported_reasons(problem) -> list[str]` (this problem).
"""
