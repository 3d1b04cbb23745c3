"""Episodes: routing, growth, snapshots, and what fails without losing anything."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

from textkv import MethodCache
from textkv.mini import load_mini
from textkv.reuse.epicache import EpiCache, Settings, Turn, own_vectors
from textkv.reuse.epicache.text import Encoder, clustered, windows

SMALL = Settings(budget=48, block=32, probe=24, episodes=2, window=2, medoids=2, tau=-1)
BIRDS, TOOLS = ("heron", "raven", "pigeon", "parrot"), ("hammer", "anvil", "shovel", "ladder")
TURNS = [Turn("man", f"the {word} is near the old river .") for word in (*BIRDS, *TOOLS)]


def by_words(texts) -> torch.Tensor:
    """An embedder that knows two topics, and sees anything else as a third."""
    rows = [[sum(w in x for w in BIRDS), sum(w in x for w in TOOLS), 0.01] for x in texts]
    return torch.tensor([row if any(row[:2]) else [0, 0, 1] for row in rows], dtype=torch.float)


@pytest.fixture(scope="module")
def mini():
    model, tokenizer = load_mini()
    model.generation_config.eos_token_id = None
    return model, tokenizer


def memory(mini, settings: Settings = SMALL, embed=by_words, folder=None) -> EpiCache:
    made = EpiCache(*mini, embed, settings, folder)
    made.read(TURNS)
    return made


# ---- the text side -------------------------------------------------------------------------------------------------


def test_windows_hold_all_turns_in_order() -> None:
    made = windows(TURNS[:5], 2)
    assert len(made) == 3 and made[0].splitlines() == [str(TURNS[0]), str(TURNS[1])]
    assert str(TURNS[0]) == 'man said, "the heron is near the old river ."'


def test_there_are_no_more_clusters_than_different_windows() -> None:
    same = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    made = clustered(same, 4, medoids=1)
    assert [cluster.members for cluster in made] == [(0, 1), (2,)]
    assert [cluster.representatives for cluster in made] == [(0,), (2,)]
    assert len(clustered(same[:2], 4, 1)) == 1
    for cluster in made:
        assert float(cluster.centre.norm()) == pytest.approx(1)


def test_without_scikit_learn_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ModuleNotFoundError, match=r"agentkv\[conversations\]"):
        clustered(torch.eye(3), 2, 1)
    assert len(clustered(torch.eye(3), 1, 1)) == 1


def test_vectors_of_the_model_itself(mini) -> None:
    for layer in (0, 2):
        vectors = Encoder(own_vectors(*mini, layer=layer))(["the old king", "the old king", "a happy river"])
        assert vectors.shape == (3, mini[0].config.hidden_size)
        torch.testing.assert_close(vectors[0], vectors[1])
        assert float(vectors[0] @ vectors[2]) < 0.999
    with pytest.raises(ValueError, match="layer=9"):
        own_vectors(*mini, layer=9)


# ---- routing and answers -------------------------------------------------------------------------------------------


def test_a_window_is_routed_to_its_own_episode(mini) -> None:
    made = memory(mini)
    assert [episode.windows for episode in made.episodes] == [(0, 1), (2, 3)]
    for episode in made.episodes:
        for number in episode.windows:
            assert made.route(windows(TURNS, 2)[number])[0] is episode
    said = made.ask("what about the hammer", 3)
    assert said.episode == "episode-1" and said.cosine > 0.9


def test_a_question_leaves_no_trace(mini) -> None:
    made = memory(mini)
    cache = made.cache_of(made.episodes[0])
    before = [layer.held_positions().clone() for layer in cache.layers]
    first = made.ask("the heron", 4)
    assert made.ask("the heron", 4) == first
    assert cache.tokens_seen == made.episodes[0].tokens
    assert all(torch.equal(a, layer.held_positions()) for a, layer in zip(before, cache.layers, strict=True))


def test_a_large_budget_is_the_full_cache(mini) -> None:
    made = memory(mini, Settings(budget=2000, block=32, probe=24, episodes=2, window=2))
    ids, truth = torch.tensor([made.prompts.history(TURNS)]), MethodCache(mini[0])
    with torch.inference_mode():
        mini[0](ids, past_key_values=truth)
        asked = torch.tensor([made.prompts.question("the heron")])
        wanted = mini[0](asked, past_key_values=truth).logits[0, -1].argmax()
    for episode in made.episodes:
        assert made.cache_of(episode).kept_positions(1).shape[-1] == ids.shape[1]
    assert made.ask("the heron", 1).text == mini[1].decode([int(wanted)])


def test_a_conversation_of_one_turn(mini, tmp_path) -> None:
    made = EpiCache(*mini, by_words, SMALL, tmp_path)
    made.read(TURNS[:1])
    assert len(made.episodes) == 1 and made.ask("the heron", 3).text
    again = EpiCache.load(tmp_path, *mini, by_words)
    assert again.turns == TURNS[:1]


# ---- growth --------------------------------------------------------------------------------------------------------


def test_turns_join_the_nearest_episode_and_stay_there(mini) -> None:
    made = memory(mini)
    before = [episode.tokens for episode in made.episodes]
    assert made.add([Turn("man", "the anvil is old .")]) == "episode-1"
    assert made.episodes[0].tokens == before[0] and made.episodes[1].tokens > before[1]
    assert made.episodes[1].windows == (2, 3, 4) and len(made.turns) == len(TURNS) + 1


def test_turns_that_are_near_to_nothing_open_an_episode(mini) -> None:
    made = memory(mini, Settings(**{**vars(SMALL), "tau": 0.5}))
    assert made.add([Turn("man", "something else altogether")]) == "episode-2"
    assert made.route("quite another thing")[0].name == "episode-2"
    assert made.add([Turn("man", "the heron again")]) == "episode-0"


def test_an_episode_that_is_full_reads_again(mini) -> None:
    made = memory(mini)
    most = SMALL.budget + SMALL.block
    for _ in range(6):
        made.add([Turn("man", "the hammer and the anvil and the shovel are in the old garden .")])
        held = [float(n) for layer in made.cache_of(made.episodes[1]).layers for n in layer.lengths().float().mean(1)]
        assert max(held) <= most
    whole = len(made.prompts.history(made.turns))
    assert len(made.turns) == len(TURNS) + 6 and len(TURNS) < made.episodes[1].tokens <= whole


# ---- snapshots -----------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_its_folder(mini, tmp_path) -> None:
    made = memory(mini, folder=tmp_path)
    made.add([Turn("man", "the anvil is old .")])
    said = [made.ask(x, 4) for x in ("the heron", "the anvil")]
    made.save()
    again = EpiCache.load(tmp_path, *mini, by_words)
    assert [again.ask(x, 4) for x in ("the heron", "the anvil")] == said
    assert again.turns == made.turns and again.settings == made.settings


def test_one_cache_is_in_memory_at_a_time(mini, tmp_path) -> None:
    made = memory(mini, folder=tmp_path)
    for question in ("the heron", "the hammer", "the heron"):
        made.ask(question, 2)
        assert made.store.kv_bytes() == made.cache_of(made.route(question)[0]).kv_bytes()
    assert memory(mini).store.kv_bytes() > made.store.kv_bytes()


@pytest.mark.parametrize("harm", ["truncated", "missing", "stale"])
def test_a_harmed_snapshot_is_made_again_from_the_text(mini, tmp_path, harm) -> None:
    made = memory(mini, folder=tmp_path)
    said = made.ask("the hammer", 4)
    made.save()
    file = tmp_path / "episode-1" / "cache.safetensors"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif harm == "missing":
        file.unlink()
    else:
        # The program stopped after the conversation was written down, and before the cache was.
        made.add([Turn("man", "the anvil is old .")])
    again = EpiCache.load(tmp_path, *mini, by_words)
    with pytest.warns(UserWarning, match="episode-1 is read again from its text"):
        answer = again.ask("the hammer", 4)
    assert harm == "stale" or answer == said
    assert again.cache_of(again.episodes[1]).tokens_seen == again.episodes[1].tokens


def test_folders_that_cannot_be_gone_on_with_are_refused(mini, tmp_path) -> None:
    memory(mini, folder=tmp_path)
    with pytest.raises(ValueError, match="holds a conversation already"):
        EpiCache(*mini, by_words, SMALL, tmp_path)
    with pytest.raises(ValueError, match="no whole conversation"):
        EpiCache.load(tmp_path / "none", *mini, by_words)
    file = tmp_path / "conversation.json"
    whole = file.read_text()
    file.write_text(whole[:-40])
    with pytest.raises(ValueError, match="no whole conversation"):
        EpiCache.load(tmp_path, *mini, by_words)
    file.write_text(json.dumps(json.loads(whole) | {"model": {"model_type": "other"}}))
    with pytest.raises(ValueError, match="of another model"):
        EpiCache.load(tmp_path, *mini, by_words)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"vectors": []}, "one vector for each text"),
        ({"vectors": [[1.0], [2.0, 3.0]]}, "one vector for each text"),
        ({"vectors": [["a"]]}, "one vector for each text"),
        ({"texts": ["one"]}, "one vector for each text"),
        ({"texts": [5]}, "an entry of texts"),
        ({"turns": [{"speaker": "a"}]}, "text"),
        ({"settings": {"budget": "x"}}, "budget='x'"),
        ({"name": "../elsewhere"}, "an episode is called '../elsewhere'"),
        ({"windows": [999]}, "has windows that the conversation has not"),
        ({"centre": [1.0]}, "is no vector of 3 numbers"),
        ({"probe": []}, "has no probe"),
        ({"tokens": "x"}, "tokens"),
    ],
)
def test_a_header_whose_parts_do_not_belong_together_is_refused(mini, tmp_path, changed, match) -> None:
    memory(mini, folder=tmp_path)
    file = tmp_path / "conversation.json"
    header = json.loads(file.read_text())
    if changed.keys() <= header.keys():
        header |= changed
    else:
        header["episodes"][0] |= changed
    file.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=match) as caught:
        EpiCache.load(tmp_path, *mini, by_words)
    assert "\n" not in str(caught.value)


# ---- faults --------------------------------------------------------------------------------------------------------


def test_an_embedder_that_fails_changes_nothing(mini) -> None:
    state = {"embed": by_words}
    made = memory(mini, embed=lambda texts: state["embed"](texts))
    said, tokens = made.ask("the heron", 3), [episode.tokens for episode in made.episodes]

    def broken(texts):
        raise RuntimeError("out of memory")

    for embed, match in (
        (broken, "the embedder failed on 1 texts: RuntimeError: out of memory"),
        (lambda texts: torch.ones(len(texts), 8), "gave 8 numbers for a text, earlier ones have 3"),
        (lambda texts: torch.ones(len(texts) + 1, 3), r"shape \(2, 3\) for 1 texts"),
        (lambda texts: torch.full((len(texts), 3), float("nan")), "not finite"),
        (lambda texts: torch.ones(len(texts), 0), r"shape \(1, 0\)"),
        (lambda texts: torch.ones(len(texts), 3, dtype=torch.complex64), "of torch.complex64; .* real numbers"),
    ):
        state["embed"] = embed
        for act in (lambda: made.ask("the heron", 3), lambda: made.add(TURNS[:1]), lambda: made.read(TURNS[:1])):
            with pytest.raises(ValueError, match=match):
                act()
    state["embed"] = by_words
    assert made.ask("the heron", 3) == said and made.turns == TURNS
    assert [episode.tokens for episode in made.episodes] == tokens


@pytest.mark.parametrize("said", ["the raven and the pigeon are old .", "nothing that is known ."])
def test_turns_that_cannot_be_read_are_not_counted(mini, said, monkeypatch, tmp_path) -> None:
    """The device is full while they are read, or the disk while the header is written."""
    made = memory(mini, replace(SMALL, tau=0.5), folder=tmp_path / "talk")
    plain = memory(mini, replace(SMALL, tau=0.5))
    told = [(list(made.turns), made._vectors.clone(), [dict(vars(x)) for x in made.episodes])]

    def fails(*given) -> None:
        raise RuntimeError("out of memory")

    for place, name in ((made.blocks, "_feed"), (made, "_write_header")):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(place, name, fails)
            made.add([Turn("man", said)])
        turns, vectors, episodes = told[0]
        assert made.turns == turns and torch.equal(made._vectors, vectors)
        assert [dict(vars(x)) | {"centre": 0} for x in made.episodes] == [x | {"centre": 0} for x in episodes]
    with warnings.catch_warnings():
        # What the header did not learn of is read again, with a word about it.
        warnings.simplefilter("ignore")
        assert made.add([Turn("man", said)]) == plain.add([Turn("man", said)])
    assert [x.windows for x in made.episodes] == [x.windows for x in plain.episodes]
    assert made.ask("the raven", 4) == plain.ask("the raven", 4)


def test_a_conversation_that_was_read_in_part_was_not_read(mini, monkeypatch) -> None:
    made, real = EpiCache(*mini, by_words, SMALL), EpiCache._build

    def second_fails(self, episode) -> None:
        if len(self.episodes) == 2:
            raise RuntimeError("out of memory")
        real(self, episode)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(EpiCache, "_build", second_fails)
        made.read(TURNS)
    with pytest.raises(ValueError, match="no conversation was read"):
        made.ask("the raven")
    made.read(TURNS)
    assert made.ask("the raven", 4) == memory(mini).ask("the raven", 4)


def test_requests_that_cannot_be(mini) -> None:
    empty = EpiCache(*mini, by_words, SMALL)
    for act, match in (
        (lambda: empty.read([]), "conversation is empty"),
        (lambda: empty.add([]), "nothing was said"),
        (lambda: empty.ask("the heron"), "no conversation was read"),
        (empty.save, "has no folder"),
        (lambda: Settings(probe=64, block=32), "probe=64 is longer than block=32"),
        (lambda: Settings(budget=0), "budget=0"),
        (lambda: Settings(budget=1.5), "budget=1.5: a whole number"),
        (lambda: Settings(block=True), "block=True: a whole number"),
        (lambda: Settings(sinks=-1), "sinks=-1: a whole number of at least 0"),
        (lambda: Settings(alpha=float("nan")), "alpha=nan"),
        (lambda: Settings(tau=float("inf")), "tau=inf"),
        (lambda: empty.ask("the heron", 0), "max_new=0"),
        (lambda: EpiCache(*mini, by_words, Settings(budget=4, block=32, probe=24)), "are protected"),
        (lambda: EpiCache(*mini, by_words, Settings(budget=4096, most_bytes=1000)), "above most_bytes=1000"),
    ):
        with pytest.raises(ValueError, match=match):
            act()


def test_no_cache_weighs_more_than_the_bound_that_was_checked(mini) -> None:
    made = memory(mini)
    for _ in range(5):
        made.add([Turn("man", "the hammer and the anvil are in the old garden .")])
    config = mini[0].config
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    entries = SMALL.budget + SMALL.block + SMALL.probe
    with pytest.raises(ValueError, match="most_bytes"):
        memory(mini, Settings(**{**vars(SMALL), "most_bytes": token * config.num_hidden_layers * entries}))
    assert made.peak_bytes <= 1.25 * token * config.num_hidden_layers * entries
