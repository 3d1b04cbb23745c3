"""The decoding configuration: every option of a generation that does not need a model, with its default and its help.

One dataclass is the source for all who take options. `dlm.decode.decode(model, ids, gen_length=64)` builds one from its
keywords, `python -m dlm.generate` and `python -m eval.decoding` make their arguments of its fields, tables take their
columns from it, and a test holds the literal signatures that diffusers needs against it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from dlm.cache import Policy, list_caches, resolve_cache
from dlm.models import DecodingSpec
from dlm.unmask import Guided, Rule, Sampling, list_rules, parse_rule
from textkv.command import checked, count, fraction, natural, some_text, weight
from textkv.expression import LARGEST

EndOfText = Literal["stop", "fill", "none"]
BLOCK_LENGTH = 32  # of "auto", in an answer that is at least as long; as in Fast-dLLM's evaluations


class AutoLength(int):
    """A block length that nobody asked for: a model with blocks of its own replaces it."""


def _option(
    default: Any,
    help: str,
    *,
    kind: Callable[[str], Any] = some_text,
    flag: str | None = None,
    choices: Sequence[str] = (),
    repeated: bool = False,
) -> Any:
    """A field with what a command line must know of it; without help it is no argument of commands."""
    about = {"help": help, "kind": kind, "flag": flag, "choices": tuple(choices), "repeated": repeated}
    return field(default=default, metadata=about)


def cache(text: str) -> str:
    """A cache policy as text, if one can be built of it. Raises ValueError else."""
    resolve_cache(text)
    return text


def unmask(text: str) -> str:
    """A rule as text, if one can be built of it. Raises ValueError else."""
    parse_rule(text)
    return text


@dataclass(frozen=True)
class DecodingConfig:
    """How a diffusion language model is to decode.

    Attributes:
        gen_length: G, tokens to generate.
        block_length: B, slots that are finished before the next ones are begun (semi-autoregressive decoding); None =
            all of them at once (pure diffusion); "auto" = 32, or the whole answer where that is shorter.
        steps: forwards that a rule with a schedule spreads the tokens over; None = G, one token each.
        cache: composition string or `Policy`, see `dlm.cache`; None = "freecache", or "block" for a block-causal model.
        unmask: rule of what to commit, see `dlm.unmask`; None = the model's own, or "guided" where there is a guide.
        guided: whether there will be a guide; `decode` knows it from its argument.
        temperature, top_p, top_k: how tokens are drawn; temperature 0 takes the most probable one.
        cfg_scale: classifier-free guidance against the same canvas with its prompt masked; 0 = none.
        eos: "stop" ends a row once all before its first end of text is written; "fill" fills what lies behind an end
            at once; "none" writes every slot.
        stop: strings that end a row as soon as its text holds one, also across blocks.
        infill: masks in the input are gaps to be written; text around them stays. gen_length=0 means the same.

    After construction `block_length` and `steps` are numbers; with `infill` None where the gaps say it, see
    `dlm.prompts.make_canvas`.

    Raises:
        ValueError: a length that is no number of tokens, blocks longer than the answer, fewer steps than blocks, a
            negative strength of guidance, an unknown convention for ends of text, sampling out of range, an unknown
            cache or rule. What depends on the model is checked by `dlm.prompts.make_canvas`.
    """

    gen_length: int = _option(128, "tokens to generate ({default})", kind=natural)
    block_length: int | None | Literal["auto"] = _option(
        "auto", f"tokens finished before the next are begun ({BLOCK_LENGTH}, or all if fewer)", kind=count
    )
    steps: int | None = _option(None, "forwards of a rule with a schedule (default: one for each token)", kind=count)
    cache: str | Policy | None = _option(
        None, "{caches}; freecache+snapkv(0.3) (default: freecache, or block)", kind=checked(cache)
    )
    unmask: str | Rule | None = _option(
        None, "{rules} (default: the model's own, or guided with a guide)", kind=checked(unmask)
    )
    guided: bool = _option(False, "")
    temperature: float = _option(0.0, "0 (default) takes the most probable token", kind=weight)
    top_p: float | None = _option(None, "draw from the most probable tokens of this mass", kind=fraction)
    top_k: int | None = _option(None, "draw from so many most probable tokens", kind=count)
    cfg_scale: float = _option(
        0.0, "classifier-free guidance by the prompt; 0 (default) = none", kind=weight, flag="--cfg"
    )
    eos: EndOfText = _option("stop", "what an end of text does ({default})", choices=get_args(EndOfText))
    stop: tuple[str, ...] = _option((), "end an answer at this text; may be given several times", repeated=True)
    infill: bool = _option(False, "")

    def __post_init__(self) -> None:
        for name in ("guided", "infill"):
            # A text is true to Python whatever it says, and infill="no" would write the masks of a prompt.
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: use True or False")
        if self.gen_length == 0 and not isinstance(self.gen_length, bool):
            object.__setattr__(self, "infill", True)
        _check_number("gen_length", self.gen_length, "tokens", least=0 if self.infill else 1)
        self._check_stop()
        # "auto" before None: what is left of None below means one block of the whole answer.
        if self.block_length == "auto":
            chosen = AutoLength(min(BLOCK_LENGTH, self.gen_length or BLOCK_LENGTH))
            object.__setattr__(self, "block_length", chosen)
        for name, unit in (("block_length", "tokens"), ("steps", "forwards")):
            if getattr(self, name) is None and not self.infill:
                object.__setattr__(self, name, self.gen_length)
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), unit)
        if not self.infill:
            self._check_lengths()
        if self.eos not in get_args(EndOfText):
            raise ValueError(f"eos={self.eos!r}: use 'stop', 'fill' or 'none'")
        scale = self.cfg_scale
        # bool is an int to Python, and cfg_scale=True would silently mean 1.
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
            raise ValueError(f"cfg_scale={scale!r} is no strength of guidance; use 0 (none) or more")
        # Built to be checked: wrong sampling, caches and rules are refused here, before weights are read.
        _ = self.sampling
        if self.cache is not None:
            resolve_cache(self.cache)
        if isinstance(self.unmask, str):
            parse_rule(self.unmask)

    def _check_stop(self) -> None:
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        if any(not isinstance(one, str) or not one for one in self.stop):
            raise ValueError(f"stop={self.stop!r}: every stop string must be a text that is not empty")

    def _check_lengths(self) -> None:
        gen_length, block_length = self.gen_length, self.block_length
        if block_length > gen_length:
            raise ValueError(
                f"block_length={block_length} is longer than gen_length={gen_length}; use at most that, or None for "
                "one single block"
            )
        # A block is never written ahead of time, so each takes a forward of its own, also a short last one.
        if self.steps < self.blocks:
            raise ValueError(
                f"steps={self.steps} do not reach gen_length={gen_length}: each of its {self.blocks} blocks of "
                f"{block_length} needs a forward; use at least {self.blocks} steps or longer blocks"
            )

    @property
    def blocks(self) -> int:
        """N, blocks of the answer: the fewest steps that it can be written in."""
        return -(-self.gen_length // self.block_length)

    @property
    def forwards(self) -> int | None:
        """`steps` as a rule takes them: None = one for each mask, of which a row may have more or fewer than G."""
        # Without gaps the default is G by now: in a block-causal model what fills the last block is written besides.
        return None if not self.infill and self.steps == self.gen_length else self.steps

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k)

    def rule(self, spec: DecodingSpec) -> str | Rule:
        """The unmasking rule that a model with this spec decodes by."""
        return self.unmask or ("guided" if self.guided else spec.unmask)

    def policy(self, spec: DecodingSpec) -> str | Policy:
        """The cache that a model with this spec decodes with."""
        return self.cache or ("freecache" if spec.block is None else "block")

    def block_of(self, spec: DecodingSpec) -> int:
        """The block length with a model of this spec: its own one unless another was asked for.

        Raises:
            ValueError: a length that does not divide the blocks of a block-causal model.
        """
        if spec.block is None:
            return self.block_length
        if self.block_length is None or isinstance(self.block_length, AutoLength):
            return spec.sub_block or spec.block
        if spec.block % self.block_length:
            raise ValueError(
                f"block_length={self.block_length} does not divide this model's blocks of {spec.block}; leave it out"
            )
        return self.block_length

    def columns(self, spec: DecodingSpec) -> dict[str, Any]:
        """The options as columns of a table, by their names; `unmask` is the rule that the model decodes by."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["help"]}
        return shown | {"unmask": self.rule(spec), "cache": self.policy(spec)}

    def check_guide(self) -> None:
        """Raises ValueError if the rule asks a guide and there is none, or the other way round."""
        if self.unmask is None:
            return
        rule = parse_rule(self.unmask) if isinstance(self.unmask, str) else self.unmask
        if isinstance(rule, Guided) and not self.guided:
            raise ValueError(f"unmask={self.unmask!r} asks a guide and none is named; use --guide, or another rule")
        if self.guided and not isinstance(rule, Guided):
            raise ValueError(f"unmask={self.unmask!r} asks no guide; use guided(...), or --guide none")


def config_of(given: DecodingConfig | None, options: dict[str, Any]) -> DecodingConfig:
    """`given` with `options` by the names of its fields; None = the defaults.

    Raises:
        TypeError: an option that there is not.
        ValueError: as `DecodingConfig`.
    """
    known = [f.name for f in fields(DecodingConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"decode() has no option {unknown[0]!r}; use one of {', '.join(known)}")
    if given is None:
        return DecodingConfig(**options)
    values = {name: getattr(given, name) for name in known}
    if "gen_length" in options:
        # These two were resolved for another length: a new length asks anew, unless they are given with it.
        values |= {"block_length": "auto", "steps": None}
    return DecodingConfig(**(values | options))


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = (), **other_help: str) -> None:
    """Adds an argument for each option (or for `names`, in that order); what is not given stays None.

    Args:
        other_help: help that differs in this command, by the option's name.
    """
    by_name = {f.name: f for f in fields(DecodingConfig) if f.metadata["help"]}
    for name in names or by_name:
        f = by_name[name]
        text = other_help.get(name, f.metadata["help"]).format(
            default=f.default, caches=", ".join(list_caches()), rules=", ".join(list_rules())
        )
        kind = {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"type": f.metadata["kind"]}
        if f.metadata["repeated"]:
            kind["action"] = "append"
        # No default of argparse's: the dataclass has them, and None tells a command that its user said nothing.
        parser.add_argument(f.metadata["flag"] or f"--{name.replace('_', '-')}", dest=name, help=text, **kind)


def from_arguments(args: argparse.Namespace, **more: Any) -> DecodingConfig:
    """The configuration that a command line asks for; `more` are defaults of the command itself.

    Raises:
        ValueError: as `DecodingConfig`.
    """
    # Without help it is no argument, and one of that name is something else: `--infill` is a text.
    names = [f.name for f in fields(DecodingConfig) if f.metadata["help"]]
    return DecodingConfig(
        **(more | {name: value for name in names if (value := getattr(args, name, None)) is not None})
    )


def _check_number(name: str, value: int, unit: str, least: int = 1) -> None:
    """Raises ValueError unless `value` is a whole number of `unit`, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is no number of {unit}; use {least} or more")
    if value > LARGEST:
        raise ValueError(f"{name}={value} is out of range; use at most {LARGEST:,}")
