"""Which conversation a request goes on from, and who makes room."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.textkv import tiny
from textkv import Conversation
from textkv.disk import NoSpace
from textkv.serve.shelf import Shelf

GREEDY = dict(do_sample=False, max_new_tokens=4)


def turn(shelf, ids):
    """One turn by way of the shelf: (its ids with the answer, the conversation)."""
    told = shelf.new().dialogue(ids, torch.ones_like(ids))
    talk = shelf.take(told)
    out = talk.generate(ids, **GREEDY)
    shelf.put(talk)
    return out, talk


def shelf_of(method="full", **options):
    model = tiny.build("llama")
    budget = None if method == "full" else 0.5
    return Shelf(lambda: Conversation(model, method, budget), lambda x: Conversation.load(x, model), **options)


def more(ids, seed):
    return torch.cat([ids, tiny.text_ids(5, seed=seed)], 1)


def test_a_request_goes_on_from_the_conversation_that_it_extends():
    shelf = shelf_of("snapkv")
    first, a = turn(shelf, tiny.text_ids(20, seed=1))
    other, b = turn(shelf, tiny.text_ids(20, seed=2))
    _, again = turn(shelf, more(first, 3))
    assert again is a and a is not b
    # all but the last generated token, which the model has not read
    assert again.last.how == "continued" and again.last.reused == first.shape[1] - 1
    assert (shelf.stats.new, shelf.stats.continued, shelf.stats.dropped) == (2, 1, 0)
    assert len(shelf) == 2


def test_the_longest_of_several_is_taken():
    shelf = shelf_of()
    ids = tiny.text_ids(20, seed=1)
    short, a = turn(shelf, ids)
    shelf.put(a.fork())  # the same beginning twice, of which one goes on
    long, b = turn(shelf, more(short, 3))
    _, c = turn(shelf, more(long, 4))
    assert c is b and c.last.reused == long.shape[1] - 1


def test_another_that_begins_alike_gets_a_copy_and_both_go_on():
    shelf = shelf_of(share=8)
    ids = tiny.text_ids(20, seed=1)
    first, a = turn(shelf, more(ids, 5))
    second, b = turn(shelf, more(ids, 6))
    assert a is not b and b.last.reused >= 20 and shelf.stats.branched == 1
    _, again = turn(shelf, more(first, 7))
    assert again is a and again.last.how == "continued"


def test_what_cannot_be_taken_back_is_read_anew_and_the_other_stays():
    shelf = shelf_of("streaming_llm", share=8)
    ids = tiny.text_ids(20, seed=1)
    first, a = turn(shelf, more(ids, 5))
    _, b = turn(shelf, more(ids, 6))
    assert b is not a and b.last.how == "new"
    _, again = turn(shelf, more(first, 7))
    assert again is a and again.last.how == "continued"


def test_a_request_in_work_is_found_by_nobody_else():
    shelf = shelf_of()
    first, a = turn(shelf, tiny.text_ids(20, seed=1))
    told = shelf.new().dialogue(more(first, 2), torch.ones_like(more(first, 2)))
    assert shelf.take(told) is a
    assert shelf.take(told) is not a


def test_the_limit_is_kept_and_the_oldest_goes_first():
    shelf = shelf_of()
    first, a = turn(shelf, tiny.text_ids(20, seed=1))
    shelf.limit = int(2.5 * shelf.kv_bytes())
    second, b = turn(shelf, tiny.text_ids(20, seed=2))
    turn(shelf, tiny.text_ids(20, seed=3))
    assert shelf.kv_bytes() <= shelf.limit and shelf.stats.dropped == 1 and len(shelf) == 2
    out, again = turn(shelf, more(first, 4))
    assert again is not a and again.last.how == "new"
    # answered all the same
    alone = shelf.new().generate(more(first, 4), **GREEDY)
    assert torch.equal(out, alone)


def test_one_that_alone_is_too_large_is_not_kept():
    shelf = shelf_of(limit=1)
    turn(shelf, tiny.text_ids(20, seed=1))
    assert len(shelf) == 0 and shelf.kv_bytes() == 0


@pytest.mark.parametrize("method", ["full", "snapkv", "adakv", "streaming_llm", "kivi(4,group=16,residual=16)"])
def test_one_that_went_to_disk_comes_back_as_it_was(method, tmp_path):
    shelf = shelf_of(method, disk=tmp_path)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    stays = shelf._kept[0].talk.fork()
    shelf.limit = 1
    turn(shelf, tiny.text_ids(20, seed=2))
    assert shelf.kv_bytes() == 0 and shelf.disk_bytes() > 0 and len(shelf) == 2
    out, again = turn(shelf, more(first, 3))
    assert again.last.how == "continued" and again.last.reused == first.shape[1] - 1
    assert torch.equal(out, stays.generate(more(first, 3), **GREEDY))
    assert (shelf.stats.to_disk, shelf.stats.from_disk, shelf.stats.dropped) == (3, 1, 0)
    shelf.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_one_on_disk_that_was_edited_is_loaded_and_taken_back(method, tmp_path):
    shelf = shelf_of(method, disk=tmp_path, share=8)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    stays = shelf._kept[0].talk.fork()
    shelf.limit = 1
    turn(shelf, tiny.text_ids(20, seed=2))
    # Of the answer two tokens stay.
    edited = more(first[:, :22], 6)
    out, again = turn(shelf, edited)
    assert again.last.how == "cropped" and again.last.reused == 22
    assert torch.equal(out, stays.generate(edited, **GREEDY))
    assert (shelf.stats.branched, shelf.stats.new, shelf.stats.dropped) == (1, 2, 0)
    # The other still goes on its own way.
    _, other = turn(shelf, more(first, 3))
    assert other.last.how == "continued" and shelf.stats.from_disk == 1


def test_one_on_disk_that_cannot_be_taken_back_is_not_even_loaded(tmp_path, monkeypatch):
    shelf = shelf_of("snapkv", disk=tmp_path, share=8, limit=1)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    monkeypatch.setattr(shelf, "load", lambda folder: pytest.fail("it was loaded"))
    _, again = turn(shelf, more(first[:, :17], 6))
    assert again.last.how == "new" and len(shelf) == 2


def test_one_on_disk_is_not_loaded_for_a_few_columns_that_are_alike(tmp_path, monkeypatch):
    """As many as a system's words: reading them is less than loading all that was said after them."""
    shelf = shelf_of(disk=tmp_path, share=8, limit=1)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    monkeypatch.setattr(shelf, "load", lambda folder: pytest.fail("it was loaded"))
    _, again = turn(shelf, more(first[:, :12], 6))
    assert again.last.how == "new"


def test_one_on_disk_that_was_edited_and_is_damaged_is_read_again(tmp_path):
    shelf = shelf_of(disk=tmp_path, share=8, limit=1)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    (shelf._stored[0].folder / "cache.safetensors").write_bytes(b"")
    _, again = turn(shelf, more(first[:, :17], 6))
    assert again.last.how == "new" and shelf.stats.dropped == 1 and len(shelf) == 1


def test_a_damaged_file_costs_its_conversation_alone(tmp_path):
    shelf = shelf_of(disk=tmp_path, limit=1)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    other, _ = turn(shelf, tiny.text_ids(20, seed=2))
    file = shelf._stored[0].folder / "cache.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    _, again = turn(shelf, more(first, 3))
    assert again.last.how == "new" and shelf.stats.dropped == 1
    _, again = turn(shelf, more(other, 3))
    assert again.last.how == "continued"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no room on the device")])
@pytest.mark.parametrize("edited", [False, True])
def test_one_for_which_there_is_no_room_now_stays_on_disk(edited, error, tmp_path, monkeypatch):
    shelf = shelf_of(disk=tmp_path, share=8, limit=1)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    file, load = shelf._stored[0].folder / "cache.safetensors", shelf.load

    def lacks(folder):
        raise error

    monkeypatch.setattr(shelf, "load", lacks)
    _, again = turn(shelf, more(first[:, :17], 6) if edited else more(first, 3))
    assert again.last.how == "new" and shelf.stats.dropped == 0 and file.exists()
    monkeypatch.setattr(shelf, "load", load)
    _, again = turn(shelf, more(first, 5))
    assert again.last.how != "new"


@pytest.mark.parametrize("error", [NoSpace("full"), ValueError("no such state"), RuntimeError("out of memory")])
def test_what_cannot_be_kept_on_disk_is_dropped(error, tmp_path, monkeypatch):
    shelf = shelf_of(disk=tmp_path, limit=1)

    def full(self, folder):
        raise error

    monkeypatch.setattr(Conversation, "save", full)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    assert len(shelf) == 0 and shelf.stats.dropped == 1
    _, again = turn(shelf, more(first, 3))
    assert again.last.how == "new"


@pytest.mark.parametrize("full", [False, True])
def test_a_full_disk_lets_go_of_those_used_longest_ago(full, tmp_path, monkeypatch):
    """There is room for five; or for none more, when others fill the disk: then not all is given up for one."""
    shelf, save, asked = shelf_of(disk=tmp_path, limit=1), Conversation.save, []
    first = [turn(shelf, tiny.text_ids(20, seed=seed))[0] for seed in range(5)]
    most = shelf.disk_bytes()

    def bounded(self, folder):
        asked.append(folder)
        if full or shelf.disk_bytes() > 0.9 * most:
            raise NoSpace("full")
        save(self, folder)

    monkeypatch.setattr(Conversation, "save", bounded)
    last, _ = turn(shelf, tiny.text_ids(20, seed=5))
    assert len(asked) <= 3 and len(shelf) == (3 if full else 5) and not any(x.exists() for x in asked[:-1])
    found = shelf.stats.from_disk
    for ids, there in ((last, not full), (first[0], False), (first[4], True)):
        told = more(ids, 9)
        talk = shelf.take(shelf.new().dialogue(told, torch.ones_like(told)))
        assert (talk.cache.tokens_seen > 0) == there
    assert shelf.stats.from_disk == found + (1 if full else 2)


def test_a_disk_that_is_taken_away_while_it_is_written_to_costs_what_lay_there(tmp_path, monkeypatch):
    place, written = tmp_path / "disk", []

    def taken_away(tensors, path, **told):
        written.append(path)
        shutil.rmtree(place)
        save_file(tensors, path, **told)

    shelf = shelf_of(disk=place, limit=1)
    monkeypatch.setattr("textkv.store.save_file", taken_away)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    assert len(written) == 1 and len(shelf) == 0 and shelf.stats.dropped == 1
    _, again = turn(shelf, more(first, 3))
    assert again.last.how == "new"
    with pytest.raises(OSError, match="it cannot be written .*No such file"):
        again.save(place)


@pytest.mark.parametrize("disk", [False, True])
def test_the_machines_memory_comes_before_the_disk(disk, tmp_path, monkeypatch):
    monkeypatch.setattr("textkv.serve.shelf.HOST", tmp_path / "host")
    shelf = shelf_of("snapkv", disk=tmp_path / "disk" if disk else None, host=10**9, limit=1)
    talks = [turn(shelf, tiny.text_ids(20, seed=seed))[0] for seed in range(3)]
    assert (shelf.stats.to_host, shelf.disk_bytes(), len(shelf)) == (3, 0, 3) and shelf.host_bytes() > 0
    # Room for two: the one that was used longest ago goes on to disk, or away.
    shelf.host = int(2.5 * shelf.host_bytes() / 3)
    talks.append(turn(shelf, tiny.text_ids(20, seed=9))[0])
    assert shelf.host_bytes() <= shelf.host and (shelf.stats.to_disk, shelf.stats.dropped) == (
        (2, 0) if disk else (0, 2)
    )
    # All come back as they were, the ones in memory without the disk.
    for seed, talk in reversed(list(enumerate(talks))):
        found, again = turn(shelf, more(talk, 30 + seed))
        here = disk or seed > 1
        assert again.last.how == ("continued" if here else "new")
    assert shelf.stats.from_host >= 2 and shelf.stats.from_disk == (2 if disk else 0)
    shelf.close()
    assert not any((tmp_path / "host").iterdir())


def test_a_full_memory_of_the_machine_is_gone_past(tmp_path, monkeypatch):
    monkeypatch.setattr("textkv.serve.shelf.HOST", tmp_path / "host")
    shelf, save = shelf_of(disk=tmp_path / "disk", host=10**9, limit=1), Conversation.save

    def full(self, folder):
        if (tmp_path / "host") in folder.parents:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(Conversation, "save", full)
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    assert (shelf.stats.to_host, shelf.stats.to_disk, shelf.stats.dropped) == (0, 1, 0)
    _, again = turn(shelf, more(first, 3))
    assert again.last.how == "continued"


def test_the_disk_has_a_limit_too(tmp_path):
    shelf = shelf_of(disk=tmp_path, limit=1)
    turn(shelf, tiny.text_ids(20, seed=1))
    shelf.disk_limit = int(1.5 * shelf.disk_bytes())
    turn(shelf, tiny.text_ids(20, seed=2))
    assert len(shelf) == 1 and shelf.disk_bytes() <= shelf.disk_limit and shelf.stats.dropped == 1


def test_finding_one_among_thousands_takes_no_time_and_holds_the_limit():
    shelf = shelf_of()
    first, _ = turn(shelf, tiny.text_ids(20, seed=1))
    known = shelf._kept[0]
    many = []
    for number in range(5_000):
        ids = known.seen.ids.clone()
        ids[0, 3 + number % 15] = 50 + number % 40
        seen = replace(known.seen, ids=ids)
        many.append(replace(known, seen=seen, line=ids.numpy().tobytes()))
    shelf._kept = [*many[:2_500], known, *many[2_500:]]
    told = shelf.new().dialogue(more(first, 3), torch.ones_like(more(first, 3)))
    began = time.perf_counter()
    talk = shelf.take(told)
    took = time.perf_counter() - began
    assert talk is known.talk and took < 0.2, f"{took:.3f} s"


def test_nobody_goes_on_from_what_another_told():
    shelf = shelf_of(share=8)
    ids = tiny.text_ids(20, seed=1)
    told = shelf.new().dialogue(ids, torch.ones_like(ids))
    talk = shelf.take(told, "Ada")
    out = talk.generate(ids, **GREEDY)
    shelf.put(talk, "Ada")
    later = more(out, 3)
    told = shelf.new().dialogue(later, torch.ones_like(later))
    assert shelf.take(told, "Bo") is not talk
    assert shelf.stats.branched == 0 and shelf.stats.new == 2
    assert shelf.take(told, "Ada") is talk


def test_what_a_killed_server_left_on_disk_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from textkv.serve.folders import OwnFolder\n"
        "own = OwnFolder(Path(sys.argv[1]), 'conversations-'); (own.path / '0').mkdir()\n"
        "print(own.path, flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)"
    )
    lives, dies = (
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    )
    kept, left = (one.stdout.readline().decode().strip() for one in (lives, dies))
    dies.communicate()
    shelf = shelf_of(disk=tmp_path)
    assert sorted(map(str, tmp_path.iterdir())) == sorted([kept, str(shelf._folder.path)]) and left != kept
    lives.communicate()
    shelf.close()
