"""One configuration: what it resolves and refuses; commands, tables and diffusers' signatures agree with it."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import asdict, fields, replace

import pytest

from agentkv.eval import decoding
from dlm import generate
from dlm.config import DecodingConfig, add_arguments, config_of, from_arguments
from dlm.decode import Stats, decode
from dlm.unmask import Sampling, resolve_unmask
from tests.dlm.toys import END, llada, prompts

NAMES = [f.name for f in fields(DecodingConfig)]
DEFAULTS = {f.name: f.default for f in fields(DecodingConfig)}


def test_lengths_are_resolved() -> None:
    assert (DecodingConfig().block_length, DecodingConfig().steps) == (32, 128)
    assert DecodingConfig(gen_length=8).block_length == 8
    assert DecodingConfig(gen_length=64, block_length=None).block_length == 64
    config = DecodingConfig(gen_length=10, block_length=4, steps=7)
    assert (config.blocks, config.steps) == (3, 7)
    assert config.sampling == Sampling() and DecodingConfig(top_k=3).sampling == Sampling(top_k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gen_length="8"), "gen_length='8' is no number of tokens; use 1 or more"),
        (dict(block_length=True), "block_length=True is no number of tokens"),
        (dict(block_length="all"), "block_length='all' is no number of tokens"),
        (dict(gen_length=8, block_length=9), "block_length=9 is longer than gen_length=8; use at most that, or None"),
        (dict(gen_length=9, block_length=4, steps=2), "use at least 3 steps or longer blocks"),
        (dict(temperature=-1), "temperature=-1 is no number >= 0"),
        (dict(cfg_scale=True), "cfg_scale=True is no strength of guidance"),
        (dict(eos="never"), "eos='never': use 'stop', 'fill' or 'none'"),
        (dict(cache="freecash"), "did you mean freecache"),
        (dict(unmask="treshold"), "did you mean threshold"),
        (dict(infill="no"), "infill='no': use True or False"),
        (dict(steps=2**70), "steps=1180591620717411303424 is out of range; use at most 2,147,483,647"),
        (dict(cache=3), "cache=3 is neither a text nor a Policy"),
        (dict(unmask="random(sampling=3)"), "sampling=3 is nothing that a text can say; its arguments are: suppress"),
    ],
)
def test_what_cannot_work_is_refused_without_a_model(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**options)


def test_guide_and_rule_belong_together() -> None:
    DecodingConfig(guided=True).check_guide()
    DecodingConfig(unmask="guided", guided=True).check_guide()
    with pytest.raises(ValueError, match="unmask='guided' asks a guide and none is named; use --guide"):
        DecodingConfig(unmask="guided").check_guide()
    with pytest.raises(ValueError, match=r"unmask='random' asks no guide; use guided\(...\), or --guide none"):
        DecodingConfig(unmask="random", guided=True).check_guide()


def test_decode_takes_a_configuration_or_its_fields() -> None:
    model, (ids, mask) = llada(), prompts(5, 3)
    config = DecodingConfig(gen_length=8, block_length=4, steps=4, cache="dual", eos="none")
    one = decode(model, ids, mask, config)
    assert one.ids.tolist() == decode(model, ids, mask, **asdict(config)).ids.tolist()
    # An option goes before the configuration's; a new length forgets what was resolved for the old one.
    assert config_of(config, {"cache": "none"}) == replace(config, cache="none")
    assert config_of(config, {"gen_length": 6}) == DecodingConfig(gen_length=6, cache="dual", eos="none")
    assert decode(model, ids, mask, config, gen_length=6).ids.shape == (2, 6)
    assert decode(model, ids, mask, gen_length=6).ids.shape == (2, 6)  # one block: shorter than 32
    with pytest.raises(TypeError, match=r"decode\(\) has no option 'length'; use one of gen_length, block_length"):
        decode(model, ids, length=8)
    with pytest.raises(ValueError, match="the rule guided needs a guide"):
        decode(model, ids, config=replace(config, guided=True))


def test_columns_are_the_options_with_the_rule_that_is_used() -> None:
    spec = llada().decoding_spec
    columns = DecodingConfig(guided=True).columns(spec)
    assert set(columns) == set(NAMES) - {"guided", "infill"} and columns["unmask"] == "guided"
    assert DecodingConfig().columns(spec)["unmask"] == "confidence" and spec.eos_ids == (END,)
    rule = resolve_unmask("random")
    assert DecodingConfig(unmask=rule).rule(spec) is rule
    assert set(Stats().columns()) >= {"forwards", "query_tokens", "tokens_per_forward", "cache_bytes_peak"}


def test_a_command_has_an_argument_for_each_field() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert from_arguments(parser.parse_args([])) == DecodingConfig()
    argv = "--gen-length 12 --block-length 6 --steps 4 --cache dual --unmask random --temperature 0.5 --top-p 0.9"
    argv += " --top-k 5 --cfg 1.5 --eos fill --stop END --stop STOP"
    made = from_arguments(parser.parse_args(argv.split()), guided=False)
    assert made == DecodingConfig(12, 6, 4, "dual", "random", False, 0.5, 0.9, 5, 1.5, "fill", ("END", "STOP"))
    assert {name for name in NAMES if getattr(made, name) == DEFAULTS[name]} == {"guided", "infill"}
    assert from_arguments(parser.parse_args([]), gen_length=64).gen_length == 64


def test_flags_and_help_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for module, missing in (
        (generate, set()),
        (decoding, {"--cache", "--unmask", "--top-p", "--top-k", "--cfg", "--stop"}),
    ):
        with pytest.raises(SystemExit):
            module.parser().parse_args(["--help"])
        said = capsys.readouterr().out
        flags = {
            "--cfg" if name == "cfg_scale" else f"--{name.replace('_', '-')}"
            for name in set(NAMES) - {"guided", "infill"}
        }
        assert {flag for flag in flags if f"  {flag} " in said} == flags - missing
        assert not any(mark in said for mark in ("{default}", "{caches}", "{rules}"))
        assert "(32, or all if fewer)" in " ".join(said.split())


def agrees(function: object, own: frozenset[str] = frozenset()) -> None:
    """Every parameter that is an option has the dataclass's default; `own` are those that mean something else."""
    takes = inspect.signature(function).parameters
    names = (set(takes) & set(NAMES)) - own
    assert names
    for name in names:
        assert takes[name].default == DEFAULTS[name], name


def test_literal_signatures_of_diffusers_agree() -> None:
    pytest.importorskip("diffusers", reason="the pipeline is an optional extra: pip install 'agentkv[pipeline]'")
    from dlm.pipeline import MaskedDiffusionPipeline
    from dlm.schedulers import SCHEDULERS, UnmaskScheduler

    # A pipeline's None asks the scheduler for a block length before it falls back on the configuration's own.
    agrees(MaskedDiffusionPipeline.__call__, own=frozenset({"block_length"}))
    takes = inspect.signature(MaskedDiffusionPipeline.__call__).parameters
    # The guide is a part of the pipeline, the rule is its scheduler, and steps are counted per block.
    assert set(NAMES) - set(takes) == {"steps", "unmask", "guided", "stop", "infill"}
    checked = inspect.signature(MaskedDiffusionPipeline.check_inputs).parameters
    assert set(NAMES) - set(checked) == {"steps", "unmask", "guided", "stop", "infill"}
    agrees(UnmaskScheduler.step)
    for name, cls in SCHEDULERS.items():
        options = {f.name: f.default for f in fields(cls.rule_class) if f.name not in ("sampling", "guide")}
        literal = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items() if key != "self"}
        assert literal == options, name
