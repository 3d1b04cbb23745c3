"""What all our model families share: a chat of screenshots and answers becomes token ids, spans and frames.

A family is a subclass that says which model class it loads, which words it was trained on, where in the chat they stand
(`Layout`), which grammar it speaks, in which numbers it counts points, and how its chat marks turns and screenshots.
The goal and the answers are data: chat markers in them stay text, so that a page cannot open a turn or claim a
screenshot. Nothing here runs code that comes with a checkpoint.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2VLImageProcessorPil

from agentkv.envs.actions import Action
from agentkv.grammars import CoordinateSpace, Frame, ParseError
from agentkv.grammars.base import Grammar, Reading
from agentkv.models.base import ADDRESS, AgentText, History, Prompt, Weightless
from agentkv.spans import find_spans
from textkv.checkpoints import check_vocabulary, load_model, load_tokenizer, readable_files
from textkv.quoting import Quoting

LONGEST_ADDRESS = 100  # characters of it that a prompt shows


@dataclass(frozen=True)
class Layout:
    """Where things stand in a chat of several steps.

    words: the turn that carries the task: of the current screenshot ("last"), of the earliest one that is shown
    ("first"), of the very first step, whose words stay when its screenshot goes ("start"), or a turn of its own before
    all screenshots ("own"). older: steps whose screenshot is no longer shown stay as assistant turns ("turns"), or as
    lines in `{steps}` of the prompt ("lines").
    """

    words: Literal["last", "first", "start", "own"] = "last"
    older: Literal["turns", "lines"] = "turns"


class ChatAdapter:
    """One model as an agent (`agentkv.models.ModelAdapter`); see the module docstring for what a subclass says.

    `known_by`: parts of checkpoints' names, lower case without separators, that tell the agent from others of the same
    architecture; an agent without any is the architecture's own. `silent`: ids that are no text of an answer.
    Raises ValueError if the image processor cuts other patches than the model reads.
    """

    model_type: ClassVar[str]
    known_by: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[Layout] = Layout()
    image_processor: ClassVar[Any] = Qwen2VLImageProcessorPil
    architecture: ClassVar[type[PreTrainedModel]]
    words: ClassVar[AgentText]
    grammar: ClassVar[Grammar]
    space: ClassVar[CoordinateSpace] = CoordinateSpace.RESIZED
    placeholder: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    chat_template: ClassVar[str | None] = None  # for a tokenizer that comes without one

    def __init__(self, model: Any, tokenizer: Any, processor: Any, text: AgentText | None = None) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.text = text or self.words
        self.history_frames, self.answer_tokens = self.text.history_frames, self.text.answer_tokens
        self.cache = self.text.cache
        ends = [model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        marks = [*tokenizer.convert_tokens_to_ids(list(self.markers)), *ends]
        self.silent = {i for mark in marks for i in (mark if isinstance(mark, list) else [mark])}
        vision = model.config.vision_config
        cut, read = (processor.patch_size, processor.merge_size), (vision.patch_size, vision.spatial_merge_size)
        if cut != read:
            raise ValueError(
                f"the image processor cuts patches of {cut[0]} pixels merged {cut[1]} by {cut[1]}, the model reads "
                f"{read[0]} and {read[1]}: take the preprocessor_config.json that belongs to this checkpoint"
            )

    @classmethod
    def load(
        cls,
        source: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        text: AgentText | None = None,
        weights: bool = True,
    ) -> Self:
        """Load from a folder or hub id; dtype None = as saved; without `weights` for a model that is run elsewhere.

        The image processor is read on its own, because the joint processor wants torchvision for videos, and as the
        PIL one, so that pixels are the same on every machine.
        """
        tokenizer = cls._tokenizer(source)
        with readable_files(source):
            processor = cls.image_processor.from_pretrained(source)
            if not weights:
                return cls(Weightless.of(cls.architecture, source), tokenizer, processor, text)
        model = load_model(cls.architecture.from_pretrained, source, dtype=dtype or "auto", attn_implementation="sdpa")
        check_vocabulary(source, model, tokenizer)
        return cls(model.to(device or "cpu").eval(), tokenizer, processor, text)

    @classmethod
    def _tokenizer(cls, source: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(AutoTokenizer.from_pretrained, source)

    def prompt(
        self, goal: str, history: History, screenshot: Image.Image, css_size: tuple[int, int] | None = None
    ) -> Prompt:
        """The prompt for one decision; see `ModelAdapter.prompt`. Tensors are on the model's device."""
        images = [image for image, _ in history if image is not None] + [screenshot]
        seen, frames = self._seen(images, css_size)
        return self._encoded(self._messages(goal, history, screenshot, frames[-1]), seen, frames)

    def growing(
        self,
        goal: str,
        answers: Sequence[str],
        images: Sequence[Image.Image],
        grids: Sequence[torch.Tensor],
        frames: Sequence[Frame],
        css_size: tuple[int, int] | None = None,
        number: int = 1,
    ) -> Prompt:
        """The prompt of a step in a chat that only grows: each one begins with the one before and its answer.

        The task's words stand with the first screenshot, the goal once more beside every other.

        Args:
            answers: to all screenshots but the last, oldest first.
            images: the newest screenshots, the current one last: those that were not told before.
            grids, frames: of the screenshots before these, as an earlier prompt had them.
            number: of the first step in this chat, from 1.

        Returns:
            `inputs` with the pixels of `images` alone; spans, frames and grids of all.
        """
        seen, new = self._seen(images, css_size)
        frames = [*frames, *new]
        seen = seen | {"image_grid_thw": torch.cat([*(grid[None] for grid in grids), seen["image_grid_thw"]])}
        # Sizes in words are those of the first screenshot: a chat that only grows cannot change them.
        return self._encoded(self._growing_messages(goal, answers, frames[0], number), seen, frames)

    def _growing_messages(self, goal: str, answers: Sequence[str], frame: Frame, number: int) -> list[dict[str, Any]]:
        again = "\n".join(filter(None, (self._later(None, frame), self.defuse(goal))))
        messages: list[dict[str, Any]] = [{"role": "system", "content": _sized(self.text.system, frame)}]
        for step in range(len(answers) + 1):
            words = [{"type": "image"}, {"type": "text", "text": again}]
            if step == 0:
                words = self._words(goal, [], number, frame)
                if not any(part["type"] == "image" for part in words):
                    words = [{"type": "image"}, *words]
            messages.append({"role": "user", "content": words})
            if step < len(answers):
                # Always as an answer that was just given: how old it is changes, and the chat must not.
                said = self._answer(self.defuse(answers[step], said=True), 1, number + step)
                messages += [] if said is None else [{"role": "assistant", "content": said}]
        return messages

    def chat(self, messages: list[dict[str, Any]], images: Sequence[Image.Image]) -> Prompt:
        """The prompt for any chat: messages as its template takes them, `{"type": "image"}` where a picture stands."""
        if images:
            return self._encoded(messages, *self._seen(images, None))
        ids = self._ids(messages, []).to(self.model.device)
        return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [], [])

    def _seen(
        self, images: Sequence[Image.Image], css_size: tuple[int, int] | None
    ) -> tuple[dict[str, Any], list[Frame]]:
        """Pictures as the image processor gives them, with their digests ("pictures"), and their frames."""
        drawn = [_on_white(image) for image in images]
        seen = dict(self.processor(images=drawn, return_tensors="pt")) | {"pictures": [_digest(x) for x in drawn]}
        grids = seen["image_grid_thw"]
        return seen, [self._frame(image, grid.tolist(), css_size) for image, grid in zip(images, grids, strict=True)]

    def _encoded(self, messages: list[dict[str, Any]], seen: dict[str, Any], frames: list[Frame]) -> Prompt:
        grids, merge = seen["image_grid_thw"], self.processor.merge_size
        ids = self._ids(messages, [int(g.prod()) // merge**2 for g in grids])
        token = self.model.config.image_token_id
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == token).int(),
            "pixel_values": seen["pixel_values"].to(self.model.dtype),
            "image_grid_thw": grids,
        }
        spans = find_spans(ids, grids, token, merge)[0]
        there = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return Prompt(there, spans, frames, seen["pictures"])

    def _ids(self, messages: list[dict[str, Any]], sizes: list[int]) -> torch.Tensor:
        """Token ids [1, S] of the chat with every placeholder repeated as often as its screenshot has visual tokens."""
        template = self.tokenizer.chat_template or self.chat_template
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(self.placeholder)
        if len(pieces) != len(sizes) + 1:
            raise ValueError(
                f"the chat template placed {len(pieces) - 1} screenshots of {len(sizes)}; "
                f"is it the template of a {self.model_type} model?"
            )
        text = pieces[0] + "".join(self.placeholder * n + after for n, after in zip(sizes, pieces[1:], strict=True))
        return torch.tensor([self._quoting.ids(text)])

    def _messages(self, goal: str, history: History, screenshot: Image.Image, frame: Frame) -> list[dict[str, Any]]:
        """The chat: one system turn; per step a user turn with its screenshot (if it is shown) and an assistant turn
        with its answer; the current screenshot; the task's words where the layout puts them.
        """
        shown = [step for step, (image, _) in enumerate(history) if image is not None] + [len(history)]
        at = {"last": len(history), "first": shown[0], "start": 0, "own": -1}[self.layout.words]
        words = self._words(goal, history[: shown[0]], len(history) + 1, frame)
        messages: list[dict[str, Any]] = [{"role": "system", "content": _sized(self.text.system, frame)}]
        if at < 0:
            messages.append({"role": "user", "content": [part for part in words if part["type"] == "text"]})
        for step, image in enumerate([*(image for image, _ in history), screenshot]):
            if step in shown or step == at:
                later = self._later(image, frame)
                beside = [{"type": "image"}, *([{"type": "text", "text": later}] if later else [])]
                content = words if step == at else beside
                seen = [part for part in content if step in shown or part["type"] == "text"]
                messages.append({"role": "user", "content": seen})
            if step < len(history) and (self.layout.older == "turns" or step >= shown[0]):
                said = self._answer(self.defuse(history[step][1], said=True), len(history) - step, step + 1)
                messages += [] if said is None else [{"role": "assistant", "content": said}]
        return messages

    def _later(self, image: Image.Image | None, frame: Frame) -> str:
        """What stands beside a screenshot that is not the task's; without the address, if nobody knows it."""
        text, address = _sized(self.text.later, frame), image.info.get(ADDRESS) if image else None
        if address is None:
            return re.sub("^.*{url}.*\n?", "", text, flags=re.MULTILINE)
        said = address.partition("?")[0]
        said = said if len(said) <= LONGEST_ADDRESS else said[:LONGEST_ADDRESS] + " ..."
        return text.replace("{url}", self.defuse(said))

    def _words(self, goal: str, older: History, step: int, frame: Frame) -> list[dict[str, Any]]:
        """The task's words and the screenshot of their turn, as parts of a message."""
        lines = [f"Step {n}: {self._line(self.defuse(answer, said=True))}" for n, (_, answer) in enumerate(older, 1)]
        prompt = _sized(self.text.prompt, frame)
        prompt = prompt if "{image}" in prompt or self.layout.words == "own" else "{image}" + prompt
        values = {"{step}": str(step), "{steps}": "\n".join(lines) or "None", "{goal}": self.defuse(goal)}
        said = "|".join(map(re.escape, values))
        words: list[dict[str, Any]] = []
        for piece in re.split("({image})", prompt):
            if piece:
                text = re.sub(said, lambda found: values[found[0]], piece)
                words.append({"type": "image"} if piece == "{image}" else {"type": "text", "text": text})
        return words

    def _line(self, answer: str) -> str:
        """An older answer as one of the lines of `{steps}`: the sentence between `Action:` and the call."""
        said = re.search(r"Action:(.*?)<tool_call>", answer, re.DOTALL)
        return (said[1] if said else answer).strip()

    def _answer(self, answer: str, age: int, number: int) -> str | None:
        """How an answer of step `number` (from 1), `age` steps ago, stands in the chat; None = not at all."""
        return answer

    def defuse(self, text: str, said: bool = False) -> str:
        """A text for the chat in which no marker is one: see `textkv.quoting`. `said`: by the model itself."""
        return self._quoting.quote(text, said)

    @property
    def _quoting(self) -> Quoting:
        return Quoting.of(self.tokenizer, self.tokenizer.chat_template or self.chat_template, self.markers)

    def _frame(self, image: Image.Image, grid: list[int], css_size: tuple[int, int] | None) -> Frame:
        _, rows, columns = grid
        patch, merge = self.processor.patch_size, self.processor.merge_size
        size, tokens = (columns * patch, rows * patch), (rows // merge, columns // merge)
        return Frame(css_size or image.size, size, tokens, self.space)

    def words_of(self, answer: Sequence[int]) -> str:
        """The text of an answer without the tokens that end a turn; the family's own marks, such as those around a box,
        stay, because the chat shows them to the model again.
        """
        return self.text_of([token for token in answer if token not in self.silent]).strip()

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of any token ids, blanks as they are."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def read(self, text: str, frame: Frame) -> Reading | ParseError:
        """What a reply says, in CSS pixels, or why there is nothing to do; never raises."""
        return self.grammar.read(text, frame)

    def parse(self, text: str, frame: Frame) -> Action | ParseError:
        """The same as one step."""
        return self.grammar.parse(text, frame)

    def render(self, action: Action, frame: Frame) -> str:
        """`action` as this family says it. Raises ValueError for an action that its grammar does not have."""
        return self.grammar.render(action, frame)

    def reply(self, thought: str, summary: str, call: str) -> str:
        """A whole reply around `call`, what `render` wrote; `thought` and `summary` (the action in a sentence) may be
        "". For answers that a recording tells of.
        """
        return f"Thought: {thought}\n{call}" if thought else call


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent, as the families' own readers of images have it."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(layer, mask=layer.getchannel("A"))
    return page


def _digest(image: Image.Image) -> bytes:
    """Of an RGB picture: all that the image processor makes its pixels from."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, salt=f"{image.width}x{image.height}".encode()).digest()


def _sized(text: str, frame: Frame) -> str:
    width, height = frame.extent
    return text.replace("{width}", str(width)).replace("{height}", str(height))
