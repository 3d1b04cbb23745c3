"""Serving: one model behind OpenAI's chat completions, its conversations keeping their caches from turn to turn.

    app = build_app(ChatEngine(model, tokenizer, "snapkv", 0.4), "my-model")
    uvicorn.run(app)

or `python -m agentkv.serve`. Needs the extra `serve`.
"""

from textkv.serve.app import Limits, build_app
from textkv.serve.engine import ENGINES, ChatEngine
from textkv.serve.interface import Cancelled, Engine, Opening, Outcome

__all__ = ["ENGINES", "Cancelled", "ChatEngine", "Engine", "Limits", "Opening", "Outcome", "build_app"]
