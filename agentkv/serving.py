"""The engine of vision-language models behind a server: chats with pictures, in the form of the agent's own family.

Unlike the runner it knows no task and no grammar: what the client says stands in the chat as it is, and the answer's
text goes back. Whoever drives UI-TARS or OpenCUA from a harness of their own has its prompts already.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from agentkv.models import OWN_AGENT, ModelAdapter, load_adapter
from textkv import Budget, resolve_method
from textkv.serve import ChatEngine, Opening
from textkv.serve.answers import Answer
from textkv.serve.engine import Prepared
from textkv.serve.protocol import ChatRequest, Message, Wrong
from textkv.serve.unread import check_cache

DEFAULT = "gui-kv"  # method
PIXELS = 40_000_000  # of one picture: beyond it a small file can fill the memory
ALL_PIXELS = 200_000_000  # of all pictures of a request, which lie in memory together


class VisionEngine(ChatEngine):
    """A model behind its adapter, conversations with pictures keeping their caches.

    Args:
        adapter: what `agentkv.models.load_adapter` gives.
        method, budget, memory, disk, rows, host: as for `ChatEngine`.
    """

    reads = tuple(OWN_AGENT)

    def __init__(
        self,
        adapter: ModelAdapter,
        method: str = "full",
        budget: Budget | float | str | None = None,
        memory: int | None = None,
        disk: Path | None = None,
        rows: int | None = None,
        host: int = 0,
    ) -> None:
        super().__init__(
            adapter.model,
            adapter.tokenizer,
            method,
            budget,
            memory,
            disk,
            adapter.answer_tokens,
            chat_template=adapter.tokenizer.chat_template or adapter.chat_template,
            rows=rows,
            host=host,
        )
        self.adapter = adapter

    @classmethod
    def check(cls, opening: Opening) -> None:
        """See `textkv.serve.Engine`."""
        if opening.chat_template is not None:
            raise ValueError("a chat template of your own is for text models; this family brings its form along")
        resolve_method(opening.method or DEFAULT, opening.budget)
        adapter = load_adapter(opening.model, weights=False)
        config = adapter.model.config
        check_cache(lambda: adapter.architecture._from_config(config), config, opening, opening.method or DEFAULT)

    @classmethod
    def open(cls, opening: Opening) -> VisionEngine:
        """See `textkv.serve.Engine`."""
        adapter = load_adapter(opening.model, opening.device, opening.dtype)
        own = opening.method or DEFAULT, opening.budget, opening.memory, opening.disk, opening.rows, opening.host
        return cls(adapter, *own)

    def prepare(self, request: ChatRequest) -> Prepared:
        """See `textkv.serve.Engine`; screenshots are told to methods that ask for them."""
        images: list[Image.Image] = []
        messages = [self._message(message, images) for message in request.messages]
        pixels = sum(image.width * image.height for image in images)
        if pixels > ALL_PIXELS:
            told = f"{len(images)} pictures of {pixels:,} pixels together"
            raise Wrong(f"{told} are more than {ALL_PIXELS:,}; send fewer or smaller ones", "messages")
        prompt = self.adapter.chat(messages, [_whole(image) for image in images])
        return self.prepared(request, prompt.inputs | {"spans": [prompt.spans], "grids": [prompt.grids]})

    def _message(self, message: Message, images: list[Image.Image]) -> dict[str, Any]:
        content: list[dict[str, str]] = []
        for part in message.parts():
            if isinstance(part, str):
                content.append({"type": "text", "text": self.adapter.defuse(part, message.role == "assistant")})
            else:
                images.append(_opened(part))
                content.append({"type": "image"})
        role = "system" if message.role == "developer" else message.role
        # Templates want a text, not a list, where a turn has no picture.
        plain = all(part["type"] == "text" for part in content)
        return {"role": role, "content": "".join(part["text"] for part in content) if plain else content}

    def _words(self, stop: Sequence[str] = ()) -> Answer:
        # As `words_of` says a whole answer.
        return Answer(self.adapter.text_of, stop, self.adapter.silent, strip=True)

    def _text(self, ids: Sequence[int]) -> str:
        return self.adapter.words_of(ids)


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def _opened(data: bytes) -> Image.Image:
    """A picture of which the size is known and nothing else was decoded."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _unreadable(f"{len(data):,} bytes that are none of {', '.join(FORMATS)}") from None
    except Exception as error:  # what decoders raise at damaged bytes is no closed list
        raise _unreadable(error) from None
    if image.width * image.height > PIXELS:
        size = f"{image.width} x {image.height}"
        raise Wrong(f"a picture of {size} is larger than {PIXELS:,} pixels; send it smaller", "messages")
    return image


def _whole(image: Image.Image) -> Image.Image:
    """The picture as it is seen."""
    try:
        image.load()
        # A photo may say which side is up: whoever looks at it sees it turned, as transformers' own loader does.
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unreadable(error) from None


def _unreadable(why: Exception | str) -> Wrong:
    return Wrong(f"a picture cannot be read: {' '.join(str(why).split())}", "messages")
