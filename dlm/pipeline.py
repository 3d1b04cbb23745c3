"""A diffusers pipeline around `dlm.decode.decode`: `MaskedDiffusionPipeline(model, scheduler, tokenizer)(prompt)`.

The pipeline has no loop: it turns its arguments into those of `decode`, and the scheduler into a rule whose choices are
the scheduler's `step`. Shift, cache policies, ragged batches and ends of text are `decode`'s. Schedulers are those of
`dlm.schedulers`, and diffusers' own `BlockRefinementScheduler` (without its editing: a written token stays).

Differences to diffusers' `LLaDA2Pipeline`: blocks begin at the end of the prompt, a callback may change `sequences`
only where nothing is cached, and there are `cache`, `cfg_scale` and `eos`.

Needs the package diffusers: `pip install 'agentkv[pipeline]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlm.cache import Policy, resolve_cache
from dlm.canvas import Canvas
from dlm.config import BLOCK_LENGTH, AutoLength, DecodingConfig, EndOfText
from dlm.decode import Decoded, Stats, decode
from dlm.models import DreamModel, LLaDAModelLM, answer_text
from dlm.models.text import FAMILIES, end_ids
from dlm.prompts import make_canvas, pad_left, prompt_ids
from dlm.scheduled import ScheduledRule
from dlm.unmask import Guided, Guider, Sampling

try:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError("dlm.pipeline needs the package diffusers: pip install 'agentkv[pipeline]'") from error

Messages = list[dict[str, str]]
NATIVE = (LLaDAModelLM, DreamModel)


@dataclass
class MaskedDiffusionPipelineOutput(BaseOutput):
    """What a pipeline wrote.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, gen_length)`): the generated part.
        texts (`list[str]`, *optional*): each row up to its end of text; None with `output_type="seq"`.
        stats (`dlm.decode.Stats`): what it cost.
    """

    sequences: torch.LongTensor
    texts: list[str] | None
    stats: Stats


class MaskedDiffusionPipeline(DiffusionPipeline):
    """Text from a masked diffusion language model (LLaDA, Dream).

    Args:
        model ([`~transformers.PreTrainedModel`]): a model of `dlm.models`.
        scheduler ([`~dlm.schedulers.UnmaskScheduler`]): which masks to write first; or a `BlockRefinementScheduler`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): not needed for `input_ids`.
        guider ([`~transformers.PreTrainedModel`], *optional*): the causal model that a `GuidedScheduler` asks.
        guider_tokenizer (*optional*): of the guider, where its vocabulary is another than the model's.
    """

    model: PreTrainedModel
    scheduler: SchedulerMixin
    tokenizer: PreTrainedTokenizerBase | None

    _optional_components = ["tokenizer", "guider", "guider_tokenizer"]
    _callback_tensor_inputs = ["sequences", "transfer_index", "sampled_tokens", "slots"]

    def __init__(
        self,
        model: PreTrainedModel,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        guider: PreTrainedModel | None = None,
        guider_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            model=model, scheduler=scheduler, tokenizer=tokenizer, guider=guider, guider_tokenizer=guider_tokenizer
        )
        if type(model) in NATIVE:
            # diffusers reads a part's class from a module that must also hold its base class `PreTrainedModel`: this
            # one does, the model's own need not.
            self.register_to_config(model=(__name__, type(model).__name__))
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if tokenizer is not None and kind in FAMILIES:
            # `from_pretrained` of a pipeline loads the bare model; the tokens that end its answers are its tokenizer's.
            model.end_ids = end_ids(tokenizer, kind)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        messages: Messages | list[Messages] | None,
        input_ids: torch.LongTensor | None,
        gen_length: int,
        block_length: int | None,
        num_inference_steps: int | None,
        temperature: float,
        top_p: float | None,
        top_k: int | None,
        cache: str | Policy | None,
        cfg_scale: float,
        eos: EndOfText,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raises ValueError naming the first argument that cannot work, before anything is computed."""
        if sum(source is not None for source in (prompt, messages, input_ids)) != 1:
            raise ValueError("Provide one of `prompt`, `messages`, or `input_ids`.")
        for name, source in (("prompt", prompt), ("messages", messages)):
            if source is not None and self.tokenizer is None:
                raise ValueError(
                    f"`tokenizer` is needed for `{name}`; build the pipeline with one, or give `input_ids`"
                )
            if source is not None and len(source) == 0:
                raise ValueError(f"`{name}` is empty; give at least one")
        if gen_length == 0:
            raise ValueError(
                "`gen_length`: gen_length=0 generates nothing; use 1 or more, or `dlm.decode` to fill gaps"
            )
        given = {"gen_length": gen_length, "block_length": block_length, "cfg_scale": cfg_scale, "eos": eos}
        given |= {"temperature": temperature, "top_p": top_p, "top_k": top_k, "cache": cache}
        options: dict[str, Any] = {}
        for name, value in given.items():
            # One more option at a time, the others at their defaults: whatever is refused now is about this one.
            options[name] = value
            _named(name, lambda: DecodingConfig(**options))
        steps = num_inference_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"`num_inference_steps` must be a number of steps per block >= 1, got {steps!r}")
        if output_type not in ("text", "seq"):
            raise ValueError(f"`output_type` must be 'text' or 'seq', got {output_type!r}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )
        self._check_scheduler()

    def _check_scheduler(self) -> None:
        # Asked of the class attribute: diffusers' own schedulers have none.
        guided = getattr(self.scheduler, "rule_class", None) is Guided
        if guided and self.guider is None:
            raise ValueError("`guider` is needed by GuidedScheduler; build the pipeline with a causal model as guider")
        if not guided and self.guider is not None:
            raise ValueError(f"`guider` is asked by GuidedScheduler only, not by {type(self.scheduler).__name__}")
        if self.scheduler.config.get("editing_threshold"):
            raise ValueError(
                f"`scheduler` has editing_threshold={self.scheduler.config['editing_threshold']}, and a written token "
                "is never taken back here; use None"
            )

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, messages: Messages | list[Messages] | None = None,
        input_ids: torch.LongTensor | None = None, attention_mask: torch.LongTensor | None = None,
        use_chat_template: bool = True, gen_length: int = 128, block_length: int | None = None,
        num_inference_steps: int | None = None, temperature: float = 0.0, top_p: float | None = None,
        top_k: int | None = None, cache: str | Policy | None = None, cfg_scale: float = 0.0, eos: EndOfText = "stop",
        generator: torch.Generator | None = None, output_type: str = "text", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> MaskedDiffusionPipelineOutput | tuple[torch.LongTensor, list[str] | None]:  # fmt: skip
        """Writes `gen_length` tokens behind each prompt.

        Args:
            prompt (`str` or `list[str]`): texts, put into the tokenizer's chat template if it has one.
            messages: one conversation, or a list of them; needs a tokenizer with a chat template.
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`): prompts padded on the left.
            attention_mask (`torch.LongTensor`, *optional*): of `input_ids`; 0 = padding.
            use_chat_template (`bool`): False takes `prompt` as plain text.
            gen_length (`int`): tokens to generate.
            block_length (`int`, *optional*): tokens finished before the next are begun; None = the scheduler's, or 32.
            num_inference_steps (`int`, *optional*): steps per block; None = one for each token. A short last block
                leaves some of its steps to the others; a rule without a schedule takes as many as it needs.
            temperature, top_p, top_k: how tokens are drawn.
            cache (`str`, *optional*): which positions each step computes anew, see `dlm.cache`; None = the model's own.
            cfg_scale (`float`): classifier-free guidance by the prompt; 0 = none.
            eos (`str`): "stop", "fill" or "none", see `dlm.decode.decode`.
            generator (`torch.Generator`, *optional*): of the random numbers.
            output_type (`str`): "text", or "seq" for token ids alone.
            return_dict (`bool`): a tuple (sequences, texts) if False.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step. A `sequences` in the
                dict that it returns replaces the generated part; only with `cache="none"`.
            callback_on_step_end_tensor_inputs (`list[str]`): of `sequences`, `transfer_index`, `sampled_tokens` and
                `slots` (the columns that the two before belong to, -1 = none).
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        names = ["sequences"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        block_length = self._block_length(gen_length) if block_length is None else block_length
        self.check_inputs(
            prompt, messages, input_ids, gen_length, block_length, num_inference_steps, temperature, top_p, top_k,
            cache, cfg_scale, eos, output_type, names,
        )  # fmt: skip
        ids, mask = self._encode(prompt, messages, input_ids, attention_mask, use_chat_template)
        source = "prompt" if prompt is not None else "messages" if messages is not None else "input_ids"
        # More steps than tokens in a block would only be forwards that write nothing.
        steps = min(num_inference_steps or block_length, block_length)
        # diffusers counts steps per block, `decode` over the whole answer.
        total = steps * -(-gen_length // block_length)
        config = DecodingConfig(gen_length, block_length, total, cache, cfg_scale=cfg_scale, eos=eos)
        _named(source, lambda: make_canvas(config, self.model.decoding_spec, ids, mask))
        self.scheduler.set_timesteps(steps, device=ids.device, block_length=block_length)
        rule = ScheduledRule(self.scheduler, self._guide(), sampling=Sampling(temperature, top_p, top_k))
        plain = resolve_cache(config.policy(self.model.decoding_spec)).name == "none"
        with self.progress_bar(total=gen_length) as bar:
            after = _AfterStep(self, rule, bar, callback_on_step_end, names, plain)
            # The rule draws, so its sampling is what was asked for; the configuration's own stays at its defaults.
            done = decode(self.model, ids, mask, config, unmask=rule, generator=generator, on_step=after)
        # diffusers' offloading moves a model off the GPU here; without it nothing happens.
        self.maybe_free_model_hooks()
        return self._output(done, output_type, return_dict)

    def _block_length(self, gen_length: Any) -> AutoLength | None:
        """The scheduler's, or 32, in an answer that is as long; None where `gen_length` is no number, for
        `check_inputs` to refuse."""
        if not isinstance(gen_length, int):
            return None
        return AutoLength(max(1, min(self.scheduler.config.get("block_length", BLOCK_LENGTH), gen_length)))

    def _guide(self) -> Guider | None:
        """The causal model that a `GuidedScheduler` asks."""
        if self.guider is None:
            return None
        # Guider wants both tokenizers or none; none says that the ids mean the same to both models.
        own = None if self.guider_tokenizer is None else self.tokenizer
        return Guider(self.guider, self.guider_tokenizer, own)

    def _encode(
        self, prompt: str | list[str] | None, messages: Messages | list[Messages] | None,
        input_ids: torch.LongTensor | None, attention_mask: torch.LongTensor | None, use_chat_template: bool,
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:  # fmt: skip
        """Prompts as ids padded on the left, and their mask."""
        device = self._execution_device
        if input_ids is not None:
            return input_ids.to(device), None if attention_mask is None else attention_mask.to(device)
        if prompt is not None:
            sources = [prompt] if isinstance(prompt, str) else prompt
        else:
            sources = [messages] if isinstance(messages[0], dict) else messages
        chat = use_chat_template and self.tokenizer.chat_template is not None
        return pad_left([prompt_ids(self.tokenizer, x, chat) for x in sources], self.model.decoding_spec.pad_id, device)

    def _output(
        self, done: Decoded, output_type: str, return_dict: bool
    ) -> MaskedDiffusionPipelineOutput | tuple[torch.LongTensor, list[str] | None]:
        texts = None
        if output_type == "text" and self.tokenizer is not None:
            texts = [answer_text(self.tokenizer, row, self.model.decoding_spec.eos_ids) for row in done.ids.tolist()]
        return MaskedDiffusionPipelineOutput(done.ids, texts, done.stats) if return_dict else (done.ids, texts)


class _AfterStep:
    """`on_step` of a pipeline's decode: the progress bar, and what a callback wants to see and to change."""

    def __init__(
        self, pipeline: MaskedDiffusionPipeline, rule: ScheduledRule, bar: Any, callback: Callable | None,
        names: Sequence[str], changeable: bool,
    ) -> None:  # fmt: skip
        self.pipeline, self.rule, self.bar, self.callback = pipeline, rule, bar, callback
        self.names, self.changeable = names, changeable
        self.sequences: torch.Tensor | None = None

    def __call__(self, canvas: Canvas, stats: Stats) -> None:
        # By the slowest row: the bar is full when the last one is.
        self.bar.update(canvas.length - canvas.prompt - max(canvas.left_rows) - self.bar.n)
        if self.callback is None:
            return
        # Rows that are finished have left the canvas; the callback sees the whole batch at every step.
        self.sequences = canvas.answers if self.sequences is None else self.sequences
        self.sequences = self.sequences.index_copy(0, canvas.rows, canvas.answers)
        # A clone: the callback may change it in place, and the difference is what tells that it did.
        seen = {"sequences": self.sequences.clone(), **self._steps(canvas)}
        step = stats.forwards - 1
        changed = self.callback(self.pipeline, step, step, {name: seen[name] for name in self.names})
        if changed and "sequences" in changed and not torch.equal(changed["sequences"], self.sequences):
            if not self.changeable:
                raise ValueError(
                    "`callback_on_step_end` changed `sequences`, but keys and values of the old ones are cached; "
                    "use cache='none'"
                )
            self._check_left(changed["sequences"], canvas)
            # Every slot again, since `commit` writes what it is given; unchanged ones get the token they have.
            tokens = changed["sequences"].to(canvas.ids)[canvas.rows]
            canvas.commit(canvas.answer_slots, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def _steps(self, canvas: Canvas) -> dict[str, torch.Tensor]:
        """What the last step did, of all rows: nothing in those that were finished before."""
        found, batch = {}, len(self.sequences)
        for name, x in self.rule.last.items():
            empty = x.new_full((batch, *x.shape[1:]), -1 if name == "slots" else 0)
            found[name] = empty.index_copy(0, canvas.rows, x)
        return found

    def _check_left(self, changed: torch.Tensor, canvas: Canvas) -> None:
        gone = torch.ones(len(self.sequences), dtype=torch.bool, device=self.sequences.device)
        gone[canvas.rows] = False
        if not torch.equal(changed.to(self.sequences)[gone], self.sequences[gone]):
            raise ValueError("`callback_on_step_end` changed a row that is finished; change it before its last step")


def _named(name: str, make: Callable[[], Any]) -> None:
    """Runs a check; what it raises is about the argument `name`."""
    try:
        make()
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
