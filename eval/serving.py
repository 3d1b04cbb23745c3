"""`python -m eval.serving`: many conversations through a server whose memory holds a few of them, and load.

Each conversation is told once by the library alone, then all of them through the server in random order, under a memory
limit that holds `--holds` of them: prompt tokens that were read against reading everything again, where turns found
their conversation, and how many answers are the library's: all of them behind the full cache; a method that evicts
keeps other tokens of a conversation that was dropped and is read again as one prompt. Then 1, 4, 16 clients at once.
The embedded text model was never trained to chat: its answers are any text, which is all that is compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentkv.serve import engine_of
from textkv import Conversation, resolve_method
from textkv.arguments import budget, methods
from textkv.command import (
    client_counts,
    count,
    question_count,
    run,
    some_text,
    started,
    token_count,
    write_rows,
)
from textkv.crowd import Turns, order_of, play
from textkv.mini import load_mini
from textkv.provenance import run_meta
from textkv.serve import ENGINES, ChatEngine, Limits, Opening, build_app
from textkv.serve.protocol import read_request

from .arguments import add_outputs
from .finished import finished

SEED = 7
PEER = "transformers serve"
ROUNDS = 3  # of each load: the servers take turns
BOARD = ("model", "budget", "conversations", "steps", "holds", "words", "answer", "requests")
"""What all rows of a file have in common."""
WORDS = "the man who came home saw his old house and a light in the window of that night".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""A chat for the embedded text model, which has none of its own."""


@dataclass(frozen=True)
class Reply:
    """One answer over HTTP."""

    text: str
    prompt: int
    cached: int
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m eval.serving", description=__doc__.split("\n\n")[0])
    p.add_argument("--model", type=some_text, default="mini-text", help="mini-text, or what agentkv.serve takes")
    p.add_argument("--methods", type=methods(), default="full,snapkv", help="of the caches (full,snapkv)")
    p.add_argument("--budget", type=budget, default="0.4", help="share of the tokens to keep, or 512t (0.4)")
    p.add_argument("--conversations", type=question_count, default=50, help="at a time (50)")
    p.add_argument("--steps", type=count, default=20, help="of each (20)")
    p.add_argument("--holds", type=count, default=10, help="conversations that the memory holds (10)")
    p.add_argument("--words", type=token_count, default=60, help="of a message (60)")
    p.add_argument("--answer", type=token_count, default=12, help="tokens of an answer (12)")
    p.add_argument("--clients", type=client_counts, default="1,4,16", help="at once, for the load (1,4,16)")
    p.add_argument("--requests", type=question_count, default=96, help=f"of each of the {ROUNDS} rounds of a load (96)")
    p.add_argument("--peer", action="store_true", help="the load on `transformers serve` too, with the same weights")
    add_outputs(p, when=", after every row; gone on with if it exists")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for a request that cannot be carried out."""
    return run("eval.serving", parser(), work, argv)


def work(args: argparse.Namespace, argv: list[str]) -> None:
    """Measures what is missing, prints, writes after every row."""
    if args.peer and args.model != "mini-text":
        raise ValueError(f"--peer compares the embedded text model, not {args.model}; use --model mini-text")
    for method in args.methods:
        resolve_method(method, args.budget)
    rows = finished(args.json, {name: getattr(args, name) for name in BOARD}, lambda row: True)
    meta = run_meta("eval.serving", argv, seed=SEED, board={name: getattr(args, name) for name in BOARD})
    for row in measured(args, {_key(row) for row in rows}):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_rows(args.json, meta, rows)


def measured(args: argparse.Namespace, known: set[tuple] = frozenset()) -> Iterator[dict[str, Any]]:
    """All rows but the `known` ones: many conversations method after method, then the load of all servers."""
    for method in args.methods:
        args.method = method
        tiers = [disk for disk in (False, True) if ("many", method, disk) not in known]
        alone = Alone(args) if tiers else None
        for disk in tiers:
            yield many(args, alone, disk)
    yield from loads(args, known)


def loads(args: argparse.Namespace, known: set[tuple]) -> Iterator[dict[str, Any]]:
    """A row per number of clients and server. The servers take turns, round after round: what else the machine does
    meanwhile falls on all of them alike.
    """
    servers = [("agentkv", method) for method in args.methods] + [(PEER, None)] * args.peer
    with ExitStack() as stack:
        doors: dict[tuple, tuple[int, str]] = {}
        for clients in args.clients:
            left = [one for one in servers if ("load", *one, clients) not in known]
            told: dict[tuple, list[tuple[list[Reply], float]]] = {one: [] for one in left}
            for number in range(ROUNDS):
                for one in left:
                    if one not in doors:
                        doors[one] = stack.enter_context(
                            transformers_serving() if one[0] == PEER else own(args, one[1])
                        )
                    told[one].append(load(args, clients, *doors[one], number))
            for server, method in left:
                replies = [reply for found, _ in told[server, method] for reply in found]
                row = {"what": "load", "server": server, "model": args.model, "clients": clients, "n": len(replies)}
                row |= {"method": method, "budget": args.budget} if server == "agentkv" else {}
                yield row | timed(replies, sum(seconds for _, seconds in told[server, method]))


def _key(row: dict[str, Any]) -> tuple:
    """What tells rows of one board apart."""
    if row["what"] == "many":
        return "many", row["method"], row["disk"]
    return "load", row["server"], row.get("method"), row["clients"]


def open_engine(args: argparse.Namespace, memory: int | None = None, disk: Path | None = None) -> ChatEngine:
    """The engine that serves `--model`."""
    if args.model == "mini-text":
        model, tokenizer = load_mini(device=args.device or "cpu")
        return ChatEngine(model, tokenizer, args.method, args.budget, memory, disk, chat_template=TEMPLATE)
    opening = Opening(
        args.model, args.device or "cpu", method=args.method, budget=args.budget, memory=memory, disk=disk
    )
    return ENGINES.find(engine_of(args.model)).open(opening)


def message(conversation: int, step: int, words: int) -> dict[str, str]:
    """What a user says: the same for the same numbers."""
    dice = random.Random(f"{SEED} {conversation} {step}")
    return {"role": "user", "content": " ".join(dice.choices(WORDS, k=words))}


def body(args: argparse.Namespace, messages: list[dict[str, str]]) -> dict[str, Any]:
    """A request."""
    return {"model": "m", "messages": messages, "max_tokens": args.answer, "temperature": 0}


class Alone:
    """Every conversation by the library alone, one `Conversation` each.

    Attributes:
        answers: of each conversation, step by step.
        bytes, seen: the most that one held after each step, and the tokens it had seen.
        seconds: for all.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.answers: list[list[str]] = []
        self.bytes, self.seen = [0] * args.steps, [0] * args.steps
        engine, begun = open_engine(args), time.perf_counter()
        for number in range(args.conversations):
            talk, messages, said = Conversation(engine.model, args.method, args.budget), [], []
            for step in range(args.steps):
                messages.append(message(number, step, args.words))
                prepared = engine.prepare(read_request(body(args, messages)))
                out = talk.generate(**prepared.inputs, **prepared.options)
                said.append(engine._text(out[0, prepared.inputs["input_ids"].shape[1] :].tolist()))
                messages.append({"role": "assistant", "content": said[-1]})
                self.bytes[step] = max(self.bytes[step], talk.cache.kv_bytes())
                self.seen[step] = max(self.seen[step], out.shape[1])
            self.answers.append(said)
        self.seconds = time.perf_counter() - begun
        engine.close()


def many(args: argparse.Namespace, alone: Alone, disk: bool) -> dict[str, Any]:
    """All conversations through one server, one request at a time, in random order."""
    limit = args.holds * max(alone.bytes)
    order = order_of(args.conversations, args.steps, SEED)
    messages: list[list[dict[str, str]]] = [[] for _ in range(args.conversations)]
    replies: list[Reply] = []
    equal = 0
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(args, limit, Path(folder) if disk else None)
        with serving(engine) as port:
            client = Client(port)
            for number in order:
                step = len(messages[number]) // 2
                messages[number].append(message(number, step, args.words))
                replies.append(client.ask(body(args, messages[number])))
                messages[number].append({"role": "assistant", "content": replies[-1].text})
                equal += replies[-1].text == alone.answers[number][step]
            figures = engine.figures()
    played = play(Turns(alone.seen, alone.bytes), order, limit, 10**15 if disk else 0).row()
    later = max(1, len(order) - args.conversations)  # of one step none comes later, and none is found
    return {
        "what": "many", "model": args.model, "method": args.method, "budget": args.budget,
        "conversations": args.conversations, "steps": args.steps, "holds": args.holds, "disk": disk, "memory": limit,
        "kv_bytes_peak": figures["kv_bytes_peak"], "n": len(order), "answers_equal": equal,
        "prefill_tokens": sum(x.prompt - x.cached for x in replies),
        "prefill_tokens_full": sum(x.prompt for x in replies),
        "found_memory": figures["conversations_continued_total"] / later,
        "found_disk": figures["conversations_from_disk_total"] / later,
        "found_memory_simulated": played["found_memory"], "found_disk_simulated": played["found_disk"],
        "seconds_alone": alone.seconds, **timed(replies),
    }  # fmt: skip


@contextmanager
def own(args: argparse.Namespace, method: str) -> Iterator[tuple[int, str]]:
    """`python -m agentkv.serve`, while it is needed: its port, and the model's name there."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "chat.jinja"
        template.write_text(TEMPLATE)
        asked = ["--model", args.model, "--method", method, "--budget", args.budget, "--device", args.device or "cpu"]
        asked += ["--chat-template", str(template)] if args.model == "mini-text" else []
        with _served([sys.executable, "-m", "agentkv.serve", *asked]) as port:
            yield port, args.model


@contextmanager
def _served(command: Sequence[str], patience: float = 240.0) -> Iterator[int]:
    """A server in a process of its own, while it is needed: its port.

    Raises:
        ChildProcessError: it did not start, or did not answer in `patience` seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started([*command, "--port", str(port)], **quiet) as process:
        until = time.monotonic() + patience
        while not _open(port):
            if process.poll() is not None or time.monotonic() > until:
                raise ChildProcessError(f"{' '.join(command[:3])} did not start")
            time.sleep(0.2)
        yield port


def load(args: argparse.Namespace, clients: int, port: int, name: str, number: int) -> tuple[list[Reply], float]:
    """`--requests` requests by so many clients at once, each telling conversations of its own and of this round alone,
    nothing limited: the answers, and the seconds for all.
    """
    each = max(1, args.requests // clients)

    def tell(client: int) -> list[Reply]:
        """What one client asks, one request after the other, and hears."""
        line, messages, replies = Client(port), [], []
        for step in range(each):
            messages = messages if step % args.steps else []
            talk = (number * 1000 + client) * 1000 + step // args.steps
            messages.append(message(talk, step, args.words))
            replies.append(line.ask(body(args, messages) | {"model": name}))
            messages.append({"role": "assistant", "content": replies[-1].text})
        return replies

    Client(port).ask(body(args, [message(-1, 0, 4)]) | {"model": name})  # whatever a first request has to load
    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        replies = [reply for told in pool.map(tell, range(clients)) for reply in told]
        return replies, time.perf_counter() - begun


def timed(replies: Sequence[Reply], seconds: float | None = None) -> dict[str, float]:
    """Requests a second, and how long clients waited."""
    waits = torch.tensor([reply.seconds for reply in replies])
    seconds = float(waits.sum()) if seconds is None else seconds
    low, high = waits.quantile(torch.tensor([0.5, 0.95])).tolist()
    return {"seconds": seconds, "requests_per_second": len(replies) / seconds, "p50": low, "p95": high}


class Client:
    """One keep-alive connection to a server of this machine."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, told: dict[str, Any]) -> Reply:
        """Sends a request and waits for its answer. Raises ChildProcessError if it is an error."""
        begun = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", json.dumps(told), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        got = json.loads(answer.read())
        if answer.status != 200:
            raise ChildProcessError(f"the server says {answer.status}: {got}")
        usage, text = got["usage"], got["choices"][0]["message"]["content"]
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return Reply(text, usage["prompt_tokens"], cached, time.perf_counter() - begun)


@contextmanager
def serving(engine: ChatEngine) -> Iterator[int]:
    """A server in this process, while it is needed: its port."""
    import uvicorn

    app = build_app(engine, "m", Limits(waiting=256))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ChildProcessError("the server did not start")
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def transformers_serving() -> Iterator[tuple[int, str]]:
    """`transformers serve` with the embedded text model, while it is needed: its port, and the model's name there."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_mini()
        tokenizer.chat_template = TEMPLATE
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--device", "cpu"]
        with _served(command) as port:
            yield port, folder


def _open(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main())
