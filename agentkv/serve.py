"""`python -m agentkv.serve`: a GUI agent, a text model or a diffusion model behind OpenAI's chat completions.

Conversations keep their compressed caches: a request whose messages go on from an earlier one's reads only what is new.
Which engine serves a model follows from its config.json; everything that can be wrong with the request is checked
before weights are read, in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import cached_file, logging

from textkv.arguments import budget, device
from textkv.checkpoints import read_object
from textkv.command import checked, cluster, count, port, processes, run, seconds, size, some_text, writable_folder
from textkv.models.loading import resolve

MINI = {"mini": "vision", "mini-growing": "vision", "mini-text": "text"}
MINI |= {"mini-dlm": "diffusion", "mini-dream": "diffusion"}
OWN_NAME = {"mini-text": "mini", "mini-dlm": "mini"}  # what an engine calls it by itself


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m agentkv.serve", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini", help=f"{', '.join(MINI)}, smollm2, a folder, or a hub id")
    p.add_argument(
        "--engine",
        type=some_text,
        help="vision, text, diffusion, or module:Class (default: by the model's config.json)",
    )
    p.add_argument("--name", type=some_text, help="what clients call the model (default: --model)")
    p.add_argument(
        "--method",
        type=some_text,
        help="of the caches (default: gui-kv with pictures, full for text, a diffusion model's own)",
    )
    p.add_argument("--budget", type=budget, help="share of the tokens to keep (0.2), or a number (512t)")
    p.add_argument("--memory", type=size, help="what conversations may hold between turns, as 8GB (default: no limit)")
    p.add_argument(
        "--host-memory", type=size, default=0, help="of the machine, for those that do not fit on its GPU (none)"
    )
    p.add_argument(
        "--disk", type=writable_folder, metavar="DIR", help="where those that do not fit lie meanwhile (dropped)"
    )
    p.add_argument(
        "--chat-template",
        type=checked(template),
        metavar="FILE",
        help="Jinja file that tells messages as text (default: the model's own; a plain one for mini-text)",
    )
    p.add_argument("--host", type=some_text, default="127.0.0.1", help="address to listen on (this machine only)")
    p.add_argument("--port", type=port, default=8000, help="port to listen on (8000)")
    p.add_argument(
        "--api-key-file", type=checked(keys), default=(), metavar="FILE", help="a key a line; one must come along"
    )
    p.add_argument("--queue", type=count, default=64, help="requests that may wait (64)")
    p.add_argument("--rows", type=processes, help="requests that are answered together (16)")
    p.add_argument("--timeout", type=seconds, default=600.0, help="seconds for one answer, waiting included (600)")
    p.add_argument("--max-request", type=size, default=32_000_000, help="size of one request (32MB)")
    p.add_argument("--replicas", type=processes, default=1, help="copies of the model, with --ray (1)")
    p.add_argument("--ray", type=cluster, metavar="local|HOST:PORT", help="where replicas run (extra ray)")
    p.add_argument("--device", type=device, default="", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 after it was told to stop, 2 for a request that cannot be carried out."""
    return run("agentkv.serve", parser(), serve, argv, explained=(SafetensorError,))


def serve(args: argparse.Namespace, argv: list[str]) -> None:
    """Checks, loads, listens until stopped."""
    # In the extra `serve`: --help and a wrong request need none.
    from textkv.serve import ENGINES, Limits, Opening, build_app
    from textkv.serve.listener import Listener
    from textkv.serve.replicas import Door, replicas
    from textkv.serve.shelf import HOST

    if args.ray is None and args.replicas > 1:
        raise ValueError(f"--replicas {args.replicas} need Ray; give --ray local, or HOST:PORT of a cluster")
    for option, told in (("--disk", args.disk), ("--host-memory", args.host_memory)):
        if told and args.memory is None:
            raise ValueError(f"{option} {told} takes what does not fit into --memory, which has no limit; give 8GB")
    if args.host_memory and not HOST.is_dir():
        raise ValueError(f"--host-memory lies in {HOST}, which this system does not have; use --disk alone")
    logging.disable_progress_bar()
    if not args.api_key_file and not _only_here(args.host):
        raise ValueError(f"--host {args.host} lets other machines in; give --api-key-file FILE, or use 127.0.0.1")
    here_alone = not args.api_key_file
    limits = Limits(args.max_request, args.queue, args.timeout)
    name, dtype = args.name or args.model, torch.bfloat16 if "cuda" in args.device else torch.float32
    model = OWN_NAME.get(args.model, args.model)
    opening = Opening(model, args.device or "cpu", dtype, args.method, args.budget, args.memory, args.disk)
    opening = replace(opening, chat_template=args.chat_template, rows=args.rows, host=args.host_memory)
    # Before the weights: a port that is taken is known at once.
    with ExitStack() as stack:
        door = stack.enter_context(_listening(args.host, args.port))
        engine = args.engine or engine_of(args.model)
        kind = ENGINES.find(engine)
        kind.check(opening)
        if args.ray is None:
            app = build_app(kind.open(opening), name, limits, args.api_key_file, here_alone=here_alone)
        else:
            spread = stack.enter_context(replicas(args.replicas, args.ray, engine, opening, limits.waiting))
            app = build_app(Door(), name, limits, args.api_key_file, spread, here_alone)
        print(f"http://{args.host}:{args.port}/v1 serves {name}", flush=True)
        Listener(app).run(sockets=[door])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"port {port} of {host} cannot be listened on ({error.strerror}); use another --port"
        ) from None


def engine_of(model: str) -> str:
    """The name of the engine that serves a model, by what config.json says it is.

    Raises:
        FileNotFoundError: no such model.
    """
    from textkv.serve import ENGINES

    if model in MINI:
        return MINI[model]
    path = cached_file(
        resolve(model), "config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if path is None:
        raise FileNotFoundError(f"model {model} has no config.json that can be had; give the folder of a model")
    kind = read_object(path).get("model_type")
    return next((name for name in ENGINES.names() if kind in ENGINES.find(name).reads), "text")


def template(text: str) -> str:
    """The chat template in a file."""
    from textkv.serve.template import read_template  # with the extra `serve`, as all that listens

    return read_template(text)


def keys(text: str) -> Any:
    """The keys in a file, one a line; it is read again when it changes."""
    from textkv.serve.doorkeeper import KeyFile

    return KeyFile(Path(text))


def _only_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
