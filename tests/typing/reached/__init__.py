"""A package that reaches ops and modules by name, as `opkit stubs` is for."""

from reached.names import added, limit, scaled

__all__ = ["added", "limit", "scaled"]
