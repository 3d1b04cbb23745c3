"""A chat completion as clients ask for it: the body of a request, checked, and what goes back.

The form is OpenAI's. A field that would change the answer and is not carried out is refused by name; what only labels a
request (`user`, `metadata`, ...) is accepted and unused.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

LARGEST_SEED = 2**63 - 1


def _whole(given: Any) -> Any:
    """Some languages write every number with a point; words and truth values are no numbers."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


# Strict: a truth value would count as 0 or 1, and a word as what it spells.
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Real = Annotated[float, Field(strict=True)]
Truth = Annotated[bool, Field(strict=True)]
Penalty = Annotated[Real, Field(ge=-2, le=2)]


def _whole_characters(text: str) -> str:
    """JSON can name half of a pair of code units, which is no character, and which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character at {error.start}; write the whole one") from None
    return text


class Wrong(ValueError):
    """A request that cannot be carried out. param: the field that is wrong; code: what clients call such an error."""

    def __init__(self, line: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(line)
        self.param, self.code = param, code


def too_long(tokens: int, limit: int) -> Wrong:
    """What is said of messages that are longer than a model reads; some clients shorten them when they meet the
    code."""
    line = f"the messages are {tokens} tokens, the model reads up to {limit}; send fewer"
    return Wrong(line, "messages", "context_length_exceeded")


Words = Annotated[str, AfterValidator(_whole_characters)]
NO_TOOLS = "no tools are called here; leave out tools, their calls and their results"


def _no_tools(given: list) -> list:
    if given:
        raise ValueError(NO_TOOLS)
    return given


NoTools = Annotated[list, AfterValidator(_no_tools)]


class _Strict(BaseModel):
    """A field that is null counts as left out, known or not: clients send answers back with all that came in them."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class _Text(_Strict):
    type: Literal["text", "input_text"]
    text: Words


class _Address(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Picture(_Strict):
    type: Literal["image_url"]
    image_url: _Address | str

    @property
    def url(self) -> str:
        """Its address, a data URL."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Message(_Strict):
    """One message. `content` is a text, or texts and pictures in order."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[Annotated[_Text | _Picture, Field(discriminator="type")]]
    name: str | None = None  # templates know no names
    # Parts of an answer that comes back, empty as it was given.
    tool_calls: Annotated[list, Field(max_length=0)] = []
    annotations: Annotated[list, Field(max_length=0)] = []

    @model_validator(mode="before")
    @classmethod
    def _of_no_tool(cls, given: Any) -> Any:
        if isinstance(given, dict) and (given.get("role") in ("tool", "function") or given.get("tool_calls")):
            raise ValueError(NO_TOOLS)
        return given

    def parts(self) -> Iterator[str | bytes]:
        """Texts as they are, and pictures as the bytes of their files.

        Raises:
            ValueError: a picture that is no data URL. Nothing is fetched, and no file of this machine is opened.
        """
        if isinstance(self.content, str):
            yield self.content
            return
        for part in self.content:
            yield part.text if isinstance(part, _Text) else _bytes_of(part.url)


class _Schema(_Strict):
    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class _Format(_Strict):
    """How an answer must be built."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Format:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self


class _StreamOptions(_Strict):
    include_usage: Truth = False
    include_obfuscation: Truth = False


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions.

    `temperature` 0 takes the likeliest token; None leaves it, as `top_p`, to the model's own generation_config.json.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    temperature: Annotated[Real, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[Whole, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: list[Words] = Field(default_factory=list, max_length=16)
    stream: Truth = False
    stream_options: _StreamOptions | None = None
    response_format: _Format | None = None

    # Carried out only in the form in which they change nothing.
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: NoTools = []
    tool_choice: Literal["none", "auto"] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    modalities: list[Literal["text"]] | None = None

    # Labels, and hints for another machine room.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    # Whose conversations it may go on from; set at the door, not by the client.
    _owner: str = PrivateAttr("")

    @property
    def owner(self) -> str:
        """Whose it is, "" where nobody is told apart."""
        return self._owner

    def of(self, owner: str) -> ChatRequest:
        """The same request as that owner's."""
        self._owner = owner
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_limit(cls, given: Any) -> Any:
        both = ("max_tokens", "max_completion_tokens")
        if isinstance(given, dict) and all(given.get(name) is not None for name in both):
            raise ValueError("max_tokens and max_completion_tokens are the same; send one of them")
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return [] if given is None else [given] if isinstance(given, str) else given

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, given: list[str]) -> list[str]:
        if "" in given:
            raise ValueError("an empty stop string would end every answer at once")
        return given

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must keep; None = it may be any text."""
        told = self.response_format
        if told is None or told.type == "text":
            return None
        # Any object, where no schema is given.
        return (told.json_schema and told.json_schema.schema_) or {"type": "object"}

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with its usage figures."""
        return self.stream_options is not None and self.stream_options.include_usage


def read_request(body: Any) -> ChatRequest:
    """The request in a decoded JSON body.

    Raises:
        Wrong: one line that names the first field that is wrong, and what it may be.
    """
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        # Where a field may be of several kinds each tells its error: the one meant is that which came furthest.
        wrong = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
        parts = [str(x) for x in wrong["loc"] if isinstance(x, int) or x.isidentifier()]
        place = ".".join(parts) or "the body"
        if wrong["type"] == "extra_forbidden":
            place = ".".join(str(x) for x in wrong["loc"])
            raise Wrong(f"{place} is no field that this server knows; leave it out", place) from None
        given = repr(wrong["input"])
        given = given if len(given) <= 80 else f"{given[:77]}..."
        line = f"{place}: {wrong['msg'].removeprefix('Value error, ')}; given was {given}"
        raise Wrong(line, ".".join(parts) or None) from None


def _bytes_of(url: str) -> bytes:
    head, comma, data = url.partition(",")
    head = head.lower()
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Wrong(
            f"a picture must come inside the request, as data:image/png;base64,...; {url[:40]!r} is not fetched",
            "messages",
        )
    try:
        # In lines, as mail has it, it is whole too.
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise Wrong(f"a picture's base64 is damaged: {error}", "messages") from None


def completion(identity: str, model: str, created: int, text: str, reason: str, usage: dict) -> dict[str, Any]:
    """The whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": reason,
    }
    return _head(identity, "chat.completion", model, created) | {"choices": [choice], "usage": usage}


def chunk(identity: str, model: str, created: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """A piece of a stream: `delta` has the role first, then texts; the last one is empty and has the reason."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _head(identity, "chat.completion.chunk", model, created) | {"choices": [choice]}


def usage_chunk(identity: str, model: str, created: int, usage: dict) -> dict[str, Any]:
    """What ends a stream whose client asked for its usage figures."""
    return _head(identity, "chat.completion.chunk", model, created) | {"choices": [], "usage": usage}


def error_body(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """What goes back instead of an answer."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _head(identity: str, what: str, model: str, created: int) -> dict[str, Any]:
    return {"id": identity, "object": what, "created": created, "model": model}
