"""Action grammars: how model families write actions as text, one module each; see `base` for what they share."""

from agentkv.grammars.base import CoordinateSpace, Frame, ParseError

__all__ = ["CoordinateSpace", "Frame", "ParseError"]
