"""The full cache: the reference that every other method is measured against."""

from dataclasses import dataclass

from textkv.method import Method, register


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Keeps every token. Its budget is ignored: a full cache is full."""

    heads_apart = True

    @property
    def evicts(self) -> bool:
        """Never."""
        return False
