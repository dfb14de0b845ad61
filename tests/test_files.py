"""Files come into their place whole or not at all."""

import os

import pytest

from casn_plugin.files import clear, move, replacing, temporary


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    target = tmp_path / "new" / "folder" / "file"
    for content in ("old", "new"):
        with replacing(target) as path:
            assert path.parent == target.parent and path != target
            path.write_text(content)
            assert not target.exists() or target.read_text() == "old"
        assert target.read_text() == content
    assert [each.name for each in target.parent.iterdir()] == ["file"]


def test_after_an_exception_the_old_file_is_there(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(target) as path:
        path.write_text("ne")
        raise RuntimeError("half-way")
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError), replacing(target):
        pass  # nothing was written
    assert target.read_text() == "old"


def test_what_a_link_of_the_old_name_points_to_is_not_written(tmp_path):
    """A planted link is replaced, not followed."""
    victim, target = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    target.symlink_to(victim)
    with replacing(target) as path:
        path.write_text("new")
    assert victim.read_text() == "precious" and not target.is_symlink()


def test_the_content_is_on_disk_before_the_move(tmp_path, monkeypatch):
    calls = []
    genuine_sync, genuine_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), genuine_sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("move"), genuine_replace(*a))[1])
    with temporary(tmp_path) as path:
        path.write_text("content")
        move(path, tmp_path / "file")
    assert calls[:2] == ["sync", "move"]


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(tmp_path):
    dead, other = tmp_path / f"{'0' * 32}.tmp", tmp_path / "notes.tmp"
    for path in (dead, other):
        path.write_text("half")
    with replacing(tmp_path / "file") as path:
        assert not dead.exists() and other.exists()
        path.write_text("being written")
        with replacing(tmp_path / "second") as second:
            second.write_text("whole")
        clear(tmp_path)
        assert path.read_text() == "being written"
    assert (tmp_path / "file").read_text() == "being written"
    assert {each.name for each in tmp_path.iterdir()} == {"file", "second", "notes.tmp"}


def test_without_locks_only_what_is_old_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("casn_plugin.files.fcntl", None)
    old, new = (tmp_path / f"{digit * 32}.tmp" for digit in "01")
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    with replacing(tmp_path / "file") as path:
        path.write_text("whole")
    assert {each.name for each in tmp_path.iterdir()} == {"file", new.name}


def test_nothing_is_no_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(FileNotFoundError, match=r"nothing was written: .*file"),
        replacing(tmp_path / "file"),
    ):
        pass
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]
