"""Results: nothing of another's is written over, nothing measured is lost."""

import json
import os
from argparse import ArgumentTypeError

import pytest

from textkv.command import results_file, write_rows, write_text

META = {"command": "python -m eval.needle --n 3"}
check = results_file("eval.needle")


def test_a_new_file_and_an_own_one_are_taken(tmp_path):
    path = tmp_path / "new" / "rows.json"
    assert check(str(path)) == path
    write_rows(path, META, [{"recall": 1.0}])
    assert check(str(path)) == path
    assert json.loads(path.read_text()) == {"meta": META, "rows": [{"recall": 1.0}]}
    assert not list(tmp_path.rglob("*.part"))


def test_an_installed_command_goes_on_with_the_same_file(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, {"command": "python -m agentkv.eval.needle"}, [])
    assert check(str(path)) == path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.json", '{"chapters": 7}'),
        ("broken.json", '{"meta": '),
        ("list.json", "[1, 2]"),
        ("deep.json", "[" * 100_000),
        ("speed.json", '{"meta": {"command": "python -m eval.speed"}, "rows": []}'),
        ("longer.json", '{"meta": {"command": "python -m eval.needles"}, "rows": []}'),
        ("picture.png", "\x89PNG..."),
        ("notes.md", "# My notes on eval.needle"),
    ],
)
def test_a_strangers_file_is_never_touched(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ArgumentTypeError, match="is there and not of python -m eval.needle; name another file"):
        check(str(path))
    assert path.read_text() == content


def test_a_table_and_a_picture_are_known_by_the_command_that_they_name(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    table, picture = tmp_path / "table.md", tmp_path / "curve.png"
    table.write_text("`python -m eval.needle --n 3`\n\n| method |\n")
    pyplot.figure().savefig(picture, metadata={"Software": "python -m eval.needle"})
    assert check(str(table)) == table and check(str(picture)) == picture


def test_a_link_stays_one_and_where_it_leads_is_written(tmp_path):
    target, link = tmp_path / "new" / "rows.json", tmp_path / "link.json"
    link.symlink_to(target)
    for _ in range(2):  # where nothing is yet, and over what the command wrote itself
        assert check(str(link)) == link
        write_rows(link, META, [])
        assert link.is_symlink() and json.loads(target.read_text())["meta"] == META
    target.write_text("my thesis")
    with pytest.raises(ArgumentTypeError, match="is there and not of"):
        check(str(link))
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(ArgumentTypeError, match="leads to itself"):
        check(str(tmp_path / "loop.json"))


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for text, line in (
        ("", "an empty name is no file"),
        (str(tmp_path), "is a folder; name a file in it"),
        (str(tmp_path / "file" / "rows.json"), "is a file, so"),
    ):
        with pytest.raises(ArgumentTypeError, match=line):
            check(text)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="a superuser may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentTypeError, match="cannot be written"):
        check(str(tmp_path / "rows.json"))


def test_figures_survive_a_disk_that_is_full(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_text(path, "old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*the results are in ") as caught:
        write_text(path, "new")
    assert path.read_text() == "old" and not list(tmp_path.glob("*.part"))
    with open(str(caught.value).rsplit(" ", 1)[1]) as rescued:
        assert rescued.read() == "new"
    os.unlink(rescued.name)


def test_what_cannot_be_saved_anywhere_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="the results are on standard output"):
        write_text(tmp_path / "rows.json", "figures")
    assert capsys.readouterr().out == "figures"
