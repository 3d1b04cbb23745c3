"""Options that the evaluations of recorded steps have in common: whose data, which agent, which caches."""

from __future__ import annotations

import argparse

from agentkv.models import AGENTS
from textkv.arguments import budgets, device, methods
from textkv.command import readable_folder, some_text


def add_data(p: argparse.ArgumentParser, told: str) -> None:
    """`--data` and `--images`; `told`: what lies in the former."""
    p.add_argument("--data", type=readable_folder, required=True, help=told)
    p.add_argument("--images", type=readable_folder, help="folder of its pictures (default: images in --data)")


def add_agent(p: argparse.ArgumentParser, budget: str) -> None:
    """The model, its prompt and grammar, and the caches it is tried with, at `budget` by default."""
    known = "mini (embedded), a folder, or a hub id of a supported family"
    p.add_argument("--model", type=some_text, default="mini", help=known)
    grammars = f"prompt and grammar: {', '.join(AGENTS)}, or module:Class; default: the checkpoint's"
    p.add_argument("--agent", type=some_text, help=grammars)
    p.add_argument("--method", type=methods(), default="full,gui-kv", help="comma-separated methods or compositions")
    shares = "comma-separated shares of the prompt to keep, or tokens as 512t"
    p.add_argument("--budget", type=budgets, default=budget, help=shares)
    p.add_argument("--device", type=device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
