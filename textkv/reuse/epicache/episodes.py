"""EpiCache: a long conversation as a few compressed caches, one for each of its topics (arXiv 2509.17396).

    memory = EpiCache(model, tokenizer, embed, Settings(budget=1024))
    memory.read(turns)
    print(memory.ask("What did I say about the garage?").text)

Every episode's cache has read the whole conversation, and kept what its own topic looks at. A question goes to the
episode whose centre its vector is nearest to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textkv.cache import MethodCache
from textkv.reuse.chat import ends
from textkv.reuse.epicache.blocks import BlockPrefill
from textkv.reuse.epicache.budgets import layer_entries
from textkv.reuse.epicache.prompts import Prompts
from textkv.reuse.epicache.settings import Settings
from textkv.reuse.epicache.snapshots import FILE, Snapshots, read_header, shape_of, write_header
from textkv.reuse.epicache.text import Embed, Encoder, Turn, cluster_of, clustered, windows

SLACK, LEAST = 9 / 8, 8
"""Buffers grow by an eighth, and by no fewer tokens than these: what a cache takes beyond its tokens at most."""


@dataclass(eq=False)
class Episode:
    """A topic.

    Attributes:
        name: of its snapshot.
        windows: numbers of its windows.
        centre: fp32 [width], of length 1.
        probe: tokens that compress its cache.
        tokens: that its cache has read.
    """

    name: str
    windows: tuple[int, ...]
    centre: torch.Tensor
    probe: tuple[int, ...]
    tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What was said to a question, from which episode, and the cosine between the two."""

    text: str
    episode: str
    cosine: float


class EpiCache:
    """A conversation under a fixed budget.

    Args:
        model: a text decoder; one conversation at a time.
        tokenizer: its own.
        embed: texts to vectors, e.g. `Embedder.load("minilm").embed` or `own_vectors(model, tokenizer)`.
        settings: see `Settings`.
        folder: where the episodes' snapshots lie, so that one of them is in memory at a time; None = all are.

    Attributes:
        turns: the conversation so far.
        episodes: its topics, oldest first.
        peak_bytes: the most that any one cache has weighed.

    Raises:
        ValueError: a budget that cannot be kept, or one that may weigh more than `most_bytes`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        embed: Embed,
        settings: Settings | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.settings = s = settings or Settings()
        self.model, self.prompts = model, Prompts(tokenizer)
        self._encode = Encoder(embed)
        layers = MethodCache(model).context.governed
        entries = layer_entries(s.sensitivity or [1.0] * layers, s.budget, s.alpha, s.floor)
        self.blocks = BlockPrefill(model, entries, s.block, s.sinks + len(self.prompts.before), s.level)
        self._check_bytes(entries)
        self._ends = ends(model, tokenizer)
        folder = None if folder is None else Path(folder)
        if folder is not None and (folder / FILE).exists():
            raise ValueError(f"{folder} holds a conversation already; go on with EpiCache.load, or give another folder")
        self.store = Snapshots(model, folder)
        self.turns: list[Turn] = []
        self.episodes: list[Episode] = []
        self._texts: list[str] = []
        self._vectors = torch.zeros(0, 0)
        self.peak_bytes = 0

    def _check_bytes(self, entries: Sequence[int]) -> None:
        config, s = self.model.config.get_text_config(), self.settings
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Keys, values, and the position that every head notes.
        token = config.num_key_value_heads * (2 * size * self.model.dtype.itemsize + 4)
        most = token * sum(SLACK * (n + s.block + s.probe) + LEAST for n in entries)
        if s.most_bytes is not None and most > s.most_bytes:
            raise ValueError(
                f"budget={s.budget}, block={s.block} and probe={s.probe} may weigh {most / 1e6:.1f} MB, above "
                f"most_bytes={s.most_bytes}; lower the budget or the block"
            )

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self, turns: Sequence[Turn]) -> None:
        """Reads a conversation from its beginning, in place of what was read before. If the reading stops half-way,
        nothing was read: a part of the topics would answer for all.

        Raises:
            ValueError: no turns, or an embedder that fails; then nothing has changed.
        """
        if not turns:
            raise ValueError("the conversation is empty; give at least 1 turn")
        texts = windows(turns, self.settings.window)
        vectors = self._encode(texts)
        clusters = clustered(vectors, self.settings.episodes, self.settings.medoids)
        self.turns, self._texts, self._vectors, self.episodes = list(turns), texts, vectors, []
        with self._or_back(([], [], self._vectors[:0], [])):
            for number, cluster in enumerate(clusters):
                self.episodes.append(Episode(f"episode-{number}", cluster.members, cluster.centre, ()))
                self._build(self.episodes[-1])
            self._write_header()

    @contextmanager
    def _or_back(self, told: tuple[list[Turn], list[str], torch.Tensor, list[Episode]]) -> Iterator[None]:
        """If what happens within fails, the conversation is this one: turns, texts, vectors, episodes."""
        episodes = [(episode, dict(vars(episode))) for episode in told[3]]
        try:
            yield
        except BaseException:
            self.turns, self._texts, self._vectors, self.episodes = told
            for episode, fields in episodes:
                vars(episode).update(fields)
            raise

    def _build(self, episode: Episode) -> None:
        """Chooses an episode's representatives and reads the whole conversation for it."""
        cluster = cluster_of(self._vectors, episode.windows, self.settings.medoids)
        texts = [self._texts[i] for i in cluster.representatives]
        episode.centre = cluster.centre
        episode.probe = self.prompts.probe(texts, cluster.representatives, self.settings.probe)
        # The one that it replaces goes first: two at a time would double the memory.
        self.store.drop(episode.name)
        self._read(episode, self.blocks.open(episode.probe), self.prompts.history(self.turns))

    def _read(self, episode: Episode, cache: MethodCache, ids: Sequence[int]) -> None:
        self.blocks.read(cache, ids, episode.probe)
        episode.tokens = cache.tokens_seen
        self.peak_bytes = max(self.peak_bytes, cache.peak_bytes)
        self.store.put(episode.name, cache)

    # ---- asking ------------------------------------------------------------------------------------------------

    def route(self, text: str) -> tuple[Episode, float]:
        """The episode nearest to a text, and its cosine.

        Raises:
            ValueError: nothing was read yet, or the embedder fails.
        """
        (vector,) = self._encode([text])
        return self._nearest(vector)

    def _nearest(self, vector: torch.Tensor) -> tuple[Episode, float]:
        if not self.episodes:
            raise ValueError("no conversation was read; call read(turns) first")
        cosines = torch.stack([episode.centre for episode in self.episodes]) @ vector
        best = int(cosines.argmax())  # of equal ones the first
        return self.episodes[best], float(cosines[best])

    def cache_of(self, episode: Episode) -> MethodCache:
        """The cache of an episode. A snapshot that is damaged, missing or older than the conversation is made again
        from the text, with a warning."""
        try:
            cache = self.store.get(episode.name)
            if cache.tokens_seen != episode.tokens:
                raise ValueError(
                    f"{episode.name} has read {cache.tokens_seen} tokens, {episode.tokens} were written down"
                )
        except ValueError as error:
            warnings.warn(f"{error}; {episode.name} is read again from its text", stacklevel=3)
            self._build(episode)
            self._write_header()
            cache = self.store.get(episode.name)
        cache.freeze()
        return cache

    @torch.inference_mode()
    def ask(self, question: str, max_new: int = 50, begun: str = "") -> Answer:
        """Answers from the nearest episode. Question and answer leave no trace; give them to `add` to keep them.

        Args:
            max_new: most tokens.
            begun: how the answer begins.

        Raises:
            ValueError: nothing was read yet, no token may be said, or the embedder fails; no cache has changed then.
        """
        if max_new < 1:
            raise ValueError(f"max_new={max_new}: an answer has at least 1 token")
        # The bare question is compared: a template around it would draw all questions to one episode.
        episode, cosine = self.route(question)
        cache = self.cache_of(episode)
        held, said, given = cache.tokens_seen, [], list(self.prompts.question(question, begun))
        try:
            while len(said) < max_new:
                ids = torch.tensor([given], device=self.model.device)
                token = int(self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
                if token in self._ends:
                    break
                said.append(token)
                given = [token]
        finally:
            self.peak_bytes = max(self.peak_bytes, cache.peak_bytes)
            cache.crop(held - cache.tokens_seen)
        return Answer(self.prompts.tokenizer.decode(said), episode.name, cosine)

    # ---- growing -----------------------------------------------------------------------------------------------

    def add(self, turns: Sequence[Turn]) -> str:
        """The conversation goes on: the turns join the nearest episode, or open one where none is near (`tau`).

        They are read behind what that episode holds. Where it would then hold more than its budget and a block, its
        representatives are chosen anew and it reads the conversation again.

        Returns:
            the name of the episode.

        Raises:
            ValueError: no turns, or an embedder that fails. Whatever fails, the model or the disk too, nothing has
                changed then.
        """
        if not turns:
            raise ValueError("nothing was said; give at least 1 turn")
        if not self.episodes:
            self.read(turns)
            return self.episodes[0].name
        text = "\n".join(map(str, turns))
        (vector,) = self._encode([text])
        episode, cosine = self._nearest(vector)
        opens = cosine < self.settings.tau
        # Before the turns count: a snapshot that has to be made again must not read them twice.
        cache = None if opens else self.cache_of(episode)
        with self._or_back((self.turns, self._texts, self._vectors, self.episodes)):
            self.turns, self._texts = [*self.turns, *turns], [*self._texts, text]
            self._vectors = torch.cat([self._vectors, vector[None]])
            number = len(self._texts) - 1
            if opens:
                probe = self.prompts.probe([text], [0], self.settings.probe)
                episode = Episode(f"episode-{len(self.episodes)}", (number,), vector, probe)
                self.episodes = [*self.episodes, episode]
                self._read(episode, self.blocks.open(episode.probe), self.prompts.history(turns))
            else:
                episode.windows = (*episode.windows, number)
                self._join(episode, cache, self.prompts.lines(turns))
            self._write_header()
        return episode.name

    def _join(self, episode: Episode, cache: MethodCache, ids: Sequence[int]) -> None:
        if not self.blocks.has_room(cache, len(ids)):
            self._build(episode)
            return
        self.blocks.append(cache, ids)
        episode.tokens = cache.tokens_seen
        self.peak_bytes = max(self.peak_bytes, cache.peak_bytes)
        self.store.changed(episode.name)

    # ---- keeping -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Brings the folder up to date.

        Raises:
            ValueError: no folder was given.
        """
        if self.store.folder is None:
            raise ValueError("this conversation has no folder; give one when it is made")
        self.store.write()
        self._write_header()

    def _write_header(self) -> None:
        if self.store.folder is None:
            return
        write_header(self.store.folder, {
            "model": shape_of(self.model), "settings": asdict(self.settings), "texts": self._texts,
            "turns": [asdict(turn) for turn in self.turns], "vectors": self._vectors.tolist(),
            "episodes": [vars(episode) | {"centre": episode.centre.tolist()} for episode in self.episodes],
        })  # fmt: skip

    @classmethod
    def load(
        cls, folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embed: Embed
    ) -> EpiCache:
        """Goes on with a conversation that lies in a folder. Its caches are read when they are asked for.

        Raises:
            ValueError: no whole conversation there, or one of another model.
        """
        header = read_header(Path(folder))
        if header["model"] != shape_of(model):
            raise ValueError(f"{folder} holds a conversation of another model: {header['model']}")
        try:
            memory = cls(model, tokenizer, embed, Settings(**header["settings"]))
            memory.turns = [Turn(**turn) for turn in header["turns"]]
            memory._texts, memory._vectors = header["texts"], torch.tensor(header["vectors"])
            memory.episodes = [
                Episode(x["name"], tuple(x["windows"]), torch.tensor(x["centre"]), tuple(x["probe"]), x["tokens"])
                for x in header["episodes"]
            ]
            memory._encode.width = memory._vectors.shape[1]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{folder} holds no whole conversation: {type(error).__name__}: {error}") from None
        memory.store = Snapshots(model, Path(folder))
        return memory
