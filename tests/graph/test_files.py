"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi05c.graph.errors import Pi05cError
from pi05c.graph.files import is_partial, refuse_replacing, replacing, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_two_that_write_one_file_at_once_write_two(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    with replacing(path) as one:
        one.write_bytes(b"one")
        with replacing(path) as other:
            other.write_bytes(b"other")
            assert one.read_bytes() == b"one"
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == {"out.npz"}


def test_what_a_killed_process_left_is_removed_and_what_others_write_stays(tmp_path: Path) -> None:
    left = tmp_path / ".out.npz.partial-00c0ffee.npz"
    left.write_bytes(b"half")
    left.with_name(f"{left.name}.request").write_text("{}")
    left.with_name(".out.npz.partial-00000000.npz.request").write_text("{}")
    mine = tmp_path / ".out.npz.partial-mine"
    mine.write_text("mine")
    os.mkfifo(tmp_path / ".out.npz.partial-0badf00d.npz")
    with replacing(tmp_path / "out.npz") as one:
        write_text(tmp_path / "out.npz", "other")
        assert one.exists()
    assert names(tmp_path) == {"out.npz", mine.name}


def test_a_link_and_a_mode_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "script.sh", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o755)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, linked: bool) -> None:
    """As /dev/null and /dev/stdout, which root could replace by a file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if linked:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(Pi05cError, match="is a pipe or a device"), replacing(path):
        raise AssertionError
    write_text(path, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "a folder"), ("/", "a folder"), ("absent/x", "does not exist"), ("n" * 300, "too long")],
)
def test_places_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Pi05cError, match=said):
        write_text(Path(name), "text")
    with pytest.raises(Pi05cError, match=said):
        refuse_replacing(Path(name), [])


def test_names_that_are_no_text_are_written_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "script", os.fsdecode(b"cd /\xff\n"))
    assert (tmp_path / "script").read_bytes() == b"cd /\xff\n"
    write_text(tmp_path / "script", "\ud800 of JSON\n")
    assert (tmp_path / "script").read_bytes() == b"? of JSON\n"


def test_which_names_are_partial(tmp_path: Path) -> None:
    with replacing(tmp_path / "model.engine") as partial:
        assert is_partial(partial.name)
        assert is_partial(f"{partial.name}.request")
    assert is_partial(".model.engine.partial")
    assert not any(map(is_partial, ("model.partial", ".partial-notes", "x.partial-00c0ffee")))
