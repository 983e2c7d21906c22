from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from dcnseg.data.check.cache import FactsCache, cache_folder, file_stamp
from dcnseg.data.check.inspection import ImageFacts, MaskFacts, from_json, to_json
from dcnseg.data.check.pairs import inspect_pairs
from dcnseg.data.pairing.splits import Splits
from dcnseg.data.sample import Sample
from tests.data.json_garbage import changed_somewhere, json_text

IMAGE = to_json(ImageFacts((9, 8), "PNG", "RGB", 8, 1, False, "ff" * 72, "ab"))
MASK = to_json(MaskFacts((9, 8), "PNG", "P", 8, 1, "values", {0: 70, 3: 2}, 2, {0: 0, 3: 9}))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def put(file: Path) -> None:
    cache = FactsCache(file.parent)
    cache.put(file, "mask", file_stamp(file), {"n": 3})
    cache.save()


def test_facts_are_cached_per_role_and_outside_the_data(file: Path) -> None:
    put(file)
    cache = FactsCache(file.parent)
    assert cache.get(file, "mask") == {"n": 3}
    assert cache.get(file, "image") is None
    assert [path.name for path in file.parent.iterdir()] == ["a.png"]
    assert len(list(cache_folder().iterdir())) == 1


def test_the_folder_may_be_given_in_another_way(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(file)
    monkeypatch.chdir(file.parent.parent)
    assert FactsCache(Path("data")).get(Path("data/a.png"), "mask") == {"n": 3}


def test_a_changed_file_is_forgotten(file: Path) -> None:
    for change in (
        lambda: os.utime(file, ns=(1, 1)),
        lambda: file.write_bytes(b"content, and more"),
        file.unlink,
    ):
        put(file)
        change()
        assert FactsCache(file.parent).get(file, "mask") is None


def test_files_that_are_no_longer_used_leave_the_cache(file: Path) -> None:
    put(file)
    other = file.with_name("b.png")
    other.write_bytes(b"x")
    cache = FactsCache(file.parent)
    cache.put(other, "mask", file_stamp(other), {})
    cache.save()
    assert FactsCache(file.parent).get(file, "mask") is None
    assert FactsCache(file.parent).get(other, "mask") == {}


def test_a_cache_that_cannot_be_written_changes_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    put(file)
    assert FactsCache(file.parent).get(file, "mask") is None


@given(changed_somewhere({"image": IMAGE, "mask": MASK}))
def test_whatever_a_cache_holds_is_facts_or_refused(content: Any) -> None:
    content = json.loads(json_text(content)) if "@" not in repr(content) else {}
    kinds: dict[str, type[Any]] = {"image": ImageFacts, "mask": MaskFacts}
    for role, kind in kinds.items():
        facts = content.get(role) if isinstance(content, dict) else None
        if not isinstance(facts, dict):
            continue
        with suppress(ValueError):
            rebuilt = from_json(kind, facts)
            assert json.loads(json.dumps(to_json(rebuilt))) == facts


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"files": 3}', "[" * 99999, "9" * 5000]
)
def test_a_damaged_cache_is_ignored(file: Path, text: str) -> None:
    put(file)
    [path] = cache_folder().iterdir()
    good = json.loads(path.read_text())
    stamp_only = {"stamp": good["files"]["mask a.png"]["stamp"]}
    entries = [{"mask a.png": entry} for entry in (None, 3, {}, stamp_only)]
    for content in (text, *(json.dumps(good | {"files": files}) for files in ([], *entries))):
        path.write_text(content)
        assert FactsCache(file.parent).get(file, "mask") is None


def test_files_with_damaged_facts_are_inspected_again(file: Path) -> None:
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(file)
    sample = Sample(file, file, "a")
    cache = FactsCache(file.parent)
    first = inspect_pairs(Splits((sample,)), cache, polygon_ids={})
    for role in ("image", "mask"):
        cache.put(file, role, file_stamp(file), {"size_hw": [9, 9], "thumbnail": "zz"})
    cache.save()
    again = inspect_pairs(Splits((sample,)), FactsCache(file.parent), polygon_ids={})
    assert again == first
    assert first[1] == []
