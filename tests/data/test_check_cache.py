from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dcnseg.data.check.cache import FactsCache, cache_folder


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def remember(file: Path) -> None:
    cache = FactsCache(file.parent)
    cache.put(file, "mask", cache.stamp(file), {"n": 3})
    cache.save()


def test_facts_are_remembered_per_role_and_outside_the_data(file: Path) -> None:
    remember(file)
    cache = FactsCache(file.parent)
    assert cache.get(file, "mask") == {"n": 3}
    assert cache.get(file, "image") is None
    assert [path.name for path in file.parent.iterdir()] == ["a.png"]
    assert len(list(cache_folder().iterdir())) == 1


def test_the_folder_may_be_given_in_another_way(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(file)
    monkeypatch.chdir(file.parent.parent)
    assert FactsCache(Path("data")).get(Path("data/a.png"), "mask") == {"n": 3}


def test_a_changed_file_is_forgotten(file: Path) -> None:
    remember(file)
    os.utime(file, ns=(1, 1))
    assert FactsCache(file.parent).get(file, "mask") is None
    remember(file)
    file.write_bytes(b"content, and more")
    assert FactsCache(file.parent).get(file, "mask") is None
    file.unlink()
    assert FactsCache(file.parent).get(file, "mask") is None


def test_files_that_are_no_longer_used_leave_the_memory(file: Path) -> None:
    remember(file)
    other = file.with_name("b.png")
    other.write_bytes(b"x")
    cache = FactsCache(file.parent)
    cache.put(other, "mask", cache.stamp(other), {})
    cache.save()
    assert FactsCache(file.parent).get(file, "mask") is None
    assert FactsCache(file.parent).get(other, "mask") == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "another"}'])
def test_a_damaged_memory_is_empty(file: Path, content: str) -> None:
    remember(file)
    memory = next(cache_folder().iterdir())
    assert json.loads(memory.read_text())["files"]
    memory.write_text(content)
    assert FactsCache(file.parent).get(file, "mask") is None


def test_a_memory_that_cannot_be_written_breaks_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    remember(file)
    assert FactsCache(file.parent).get(file, "mask") is None
