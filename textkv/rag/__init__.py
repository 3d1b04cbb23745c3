"""Answers from a folder of documents, on a cache of any method: `python -m textkv.rag index`, then `... ask`."""

from textkv.rag.answer import Answer, Reader
from textkv.rag.documents import Chunk, read_folder
from textkv.rag.index import Index, Passage

__all__ = ["Answer", "Chunk", "Index", "Passage", "Reader", "read_folder"]
