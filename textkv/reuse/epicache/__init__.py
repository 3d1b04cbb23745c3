"""EpiCache: long conversations under a fixed memory, as a compressed cache for each topic (arXiv 2509.17396).

memory = EpiCache(model, tokenizer, own_vectors(model, tokenizer), Settings(budget=1024), folder="talk")
memory.read([Turn("Ann", "I moved to Porto."), Turn("Ben", "How is it?")])
memory.ask("Where does Ann live?")
"""

from textkv.reuse.epicache.blocks import BlockPrefill
from textkv.reuse.epicache.budgets import layer_entries, sensitivities
from textkv.reuse.epicache.episodes import Answer, EpiCache
from textkv.reuse.epicache.settings import Settings
from textkv.reuse.epicache.text import Turn, own_vectors

__all__ = ["Answer", "BlockPrefill", "EpiCache", "Settings", "Turn", "layer_entries", "own_vectors", "sensitivities"]
