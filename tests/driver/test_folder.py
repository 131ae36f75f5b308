"""The output folder: what it may replace, and that it is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_folder import write_engine

from pi05c import folder
from pi05c.folder import FAILED_BUILD, MANIFEST, PLAN, check_output, scratch
from pi05c.graph.errors import Pi05cError


def publish(output: Path, text: str = "new") -> None:
    with scratch(output) as work:
        write_engine(work.folder, text)
        work.publish(output)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_new_folder_appears_with_its_parents(tmp_path: Path) -> None:
    publish(tmp_path / "runs" / "today" / "engine")
    assert (tmp_path / "runs" / "today" / "engine" / "model.onnx").read_text() == "new"
    assert names(tmp_path / "runs" / "today") == ["engine"]


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    output = write_engine(tmp_path / "engine")
    publish(output)
    assert (output / "model.onnx").read_text() == "new"
    assert names(tmp_path) == ["engine"]


def test_the_folder_has_the_permissions_that_mkdir_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    publish(tmp_path / "engine")
    assert (tmp_path / "engine").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    place = write_engine(tmp_path / "engine-1")
    link = tmp_path / "engine"
    link.symlink_to(place)
    publish(link)
    assert link.is_symlink()
    assert (place / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_run_that_fails_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    output = write_engine(tmp_path / "engine")

    def fail() -> None:
        with scratch(output) as work:
            write_engine(work.folder, "half")
            raise error

    with pytest.raises(error):
        fail()
    assert (output / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["engine"]


def test_a_run_that_fails_leaves_no_parents_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), scratch(tmp_path / "a" / "b" / "engine"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    abandoned = tmp_path / ".engine.partial-0badcafe"
    abandoned.mkdir()
    (abandoned / "model.onnx").write_text("half")
    with scratch(output) as first, scratch(output) as second:
        assert not abandoned.exists()
        assert first.folder.is_dir()
        assert second.folder.is_dir()
        assert first.folder != second.folder


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_where_folders_cannot_be_exchanged_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(folder, "_renameat2", lambda new, old: code)
    output = write_engine(tmp_path / "engine")
    publish(output)
    assert (output / "model.onnx").read_text() == "new"
    assert names(tmp_path) == ["engine"]


def test_the_first_of_two_renames_is_undone_when_the_second_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_renameat2", lambda new, old: errno.ENOSYS)
    output = write_engine(tmp_path / "engine")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if target == output and (self / "model.onnx").read_text() == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(Pi05cError, match="cannot be written"):
        publish(output)
    assert (output / "model.onnx").read_text() == "old"
    assert names(tmp_path) == ["engine"]


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "engine").write_text("")
    with pytest.raises(Pi05cError, match="is a file, but a folder is written"):
        check_output(tmp_path / "engine")


def test_a_folder_without_a_manifest_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Pi05cError, match=f"no {MANIFEST}"):
        check_output(tmp_path)


def test_a_folder_with_a_file_that_its_manifest_does_not_name_is_not_replaced(tmp_path: Path) -> None:
    output = write_engine(tmp_path / "engine")
    (output / "tuning").mkdir()
    (output / "tuning" / "notes.txt").write_text("mine")
    with pytest.raises(Pi05cError, match=r"tuning/notes\.txt"):
        check_output(output)


def test_a_foreign_file_that_comes_during_the_run_is_not_lost(tmp_path: Path) -> None:
    output = write_engine(tmp_path / "engine")
    with scratch(output) as work:
        write_engine(work.folder, "new")
        (output / "notes.txt").write_text("mine")
        with pytest.raises(Pi05cError, match=r"notes\.txt"):
            work.publish(output)
    assert names(output) == [MANIFEST, "model.onnx", "notes.txt"]


def test_what_the_device_adds_to_a_folder_may_be_replaced(tmp_path: Path) -> None:
    output = write_engine(tmp_path / "engine")
    (output / PLAN).write_text("built by build_engine.sh")
    (output / "timing.cache").write_text("")
    (output / FAILED_BUILD).mkdir()
    (output / FAILED_BUILD / "build.log").write_text("")
    check_output(output)


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    publish(tmp_path / "engine")
    assert (tmp_path / "engine" / "model.onnx").read_text() == "new"


@pytest.mark.parametrize("output", ["policy/model.onnx", "policy", "."])
def test_the_input_is_never_replaced(tmp_path: Path, output: str) -> None:
    (tmp_path / "policy").mkdir()
    model = tmp_path / "policy" / "model.onnx"
    model.write_text("")
    with pytest.raises(Pi05cError, match="would replace its own input"):
        check_output(tmp_path / output, inputs=[model])


def test_an_input_that_is_reached_by_a_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.onnx").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "policy")
    with pytest.raises(Pi05cError, match="would replace its own input"):
        check_output(tmp_path / "policy", inputs=[tmp_path / "link" / "model.onnx"])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "choose a place where you may write"),
        (errno.EBUSY, "mount point"),
        (errno.EIO, "input/output error"),
    ],
)
def test_what_the_disk_answers_becomes_a_sentence(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(Pi05cError, match=said) as caught, scratch(tmp_path / "engine"):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path / "engine") in str(caught.value)
    assert names(tmp_path) == []


def test_what_is_no_scratch_folder_is_left_alone(tmp_path: Path) -> None:
    """A pipe of such a name would be waited for."""
    os.mkfifo(tmp_path / ".engine.partial-pipe")
    (tmp_path / ".engine.partial-file").write_text("mine")
    (tmp_path / ".engine.partial-link").symlink_to(tmp_path)
    (tmp_path / ".other.partial-0").mkdir()
    publish(tmp_path / "engine")
    publish(tmp_path / "*")
    left = {".engine.partial-pipe", ".engine.partial-file", ".engine.partial-link", ".other.partial-0"}
    assert set(names(tmp_path)) == {"engine", "*", *left}


def test_an_unfinished_folder_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    place = tmp_path / "engine.unfinished"
    place.mkdir()
    (place / "checkpoint.json").write_text("{}")
    (place / "weights.bin").write_text("mine")
    folder.remove_unfinished(place)
    assert names(place) == ["checkpoint.json", "weights.bin"]
    (place / "weights.bin").rename(place / "model.onnx.data")
    folder.remove_unfinished(place)
    assert not place.exists()


def test_half_written_files_in_an_engine_folder_are_pi05cs(tmp_path: Path) -> None:
    """As a process leaves them that is killed while it builds."""
    output = write_engine(tmp_path / "engine")
    for name in (".manifest.json.partial-00c0ffee.json", ".model.engine.partial-00c0ffee.engine.request"):
        (output / name).write_text("half")
    check_output(output)
    (output / ".notes.partial-mine").write_text("mine")
    with pytest.raises(Pi05cError, match="which its manifest"):
        check_output(output)


@pytest.mark.parametrize("inside", [".", "parts"])
def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    output = write_engine(tmp_path / "engine")
    (output / "parts").mkdir()
    monkeypatch.chdir(output / inside)
    with pytest.raises(Pi05cError, match="the current folder with it: run this from another folder"):
        check_output(output)


@pytest.mark.skipif(not Path("/proc").is_mount(), reason="a mount point that is always there")
def test_places_that_cannot_be_replaced(tmp_path: Path) -> None:
    with pytest.raises(Pi05cError, match="is a mount point"):
        check_output(Path("/proc"))
    with pytest.raises(Pi05cError, match=r"would be replaced|mount point"):
        check_output(Path("/"))
