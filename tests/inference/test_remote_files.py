from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dcnseg.errors import ConfigError, DataError
from dcnseg.files import OUTPUT_MARKER
from dcnseg.inference.remote_files import (
    UrlPath,
    explain_url_errors,
    has_content,
    has_unmarked_content,
    is_marked,
    local_copy,
    local_outputs,
    mark,
    to_path,
)


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").rm("/", recursive=True)


def test_paths_and_urls(tmp_path: Path) -> None:
    assert to_path("a/b") == Path("a/b")
    assert to_path((tmp_path / "ü b").as_uri()) == tmp_path / "ü b"
    bucket = to_path("s3://bucket/a/")
    assert isinstance(bucket, UrlPath)
    assert str(bucket / PurePosixPath("b/c.png")) == "s3://bucket/a/b/c.png"
    assert (bucket / "b/c.png").relative_to(bucket) == PurePosixPath("b/c.png")
    assert (bucket / "c.png").name == "c.png"
    assert UrlPath("https://host/c.png?key=a/b.x").name == "c.png"


# `local` renames after writing, as file systems that are no object stores do.
@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_a_folder_at_a_url(tmp_path: Path, scheme: str) -> None:
    root = UrlPath(f"{scheme}://{tmp_path}/root")
    assert not root.exists()
    assert root.find() == []
    assert not has_content(root)
    for name in ("b.png", "sub/a.png", "sub/c.txt"):
        (root / name).write_bytes(name.encode())
    assert root.is_dir()
    assert root.find() == [root / name for name in ("b.png", "sub/a.png", "sub/c.txt")]
    assert root.glob("*.png") == [root / "b.png"]
    assert root.glob("**/*.png") == [root / "b.png", root / "sub/a.png"]
    assert (root / "sub/a.png").is_file()
    assert not (root / "sub").is_file()
    assert has_unmarked_content(root)
    mark(root)
    mark(root)
    assert is_marked(root)
    assert not has_unmarked_content(root)
    (root / "b.png").write_bytes(b"new")
    assert (root / "b.png").read_bytes() == b"new"
    assert OUTPUT_MARKER in {path.name for path in root.find()}


def test_patterns() -> None:
    assert UrlPath("s3://b/a/*/c.png").split_pattern() == (UrlPath("s3://b/a"), "*/c.png")
    assert UrlPath("s3://b/a/c.png").split_pattern()[1] == ""
    assert UrlPath("https://b/a?key=1").split_pattern()[1] == ""


def test_a_file_that_is_not_complete_is_not_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = UrlPath(f"local://{tmp_path}/a.png")
    system = fsspec.filesystem("local")
    monkeypatch.setattr(type(system), "mv", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        target.write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_url_without_a_package_for_it() -> None:
    with pytest.raises(ConfigError, match=r"nothing://a: cannot be opened \(Protocol not known"):
        UrlPath("nothing://a").exists()


def test_copies_name_the_url_in_errors() -> None:
    url = UrlPath("memory://in/a.png")
    with pytest.raises(DataError, match=r"memory://in/a\.png: cannot be read \("), local_copy(url):
        pass
    url.write_bytes(b"bytes")
    with local_copy(url) as path:
        assert path.suffix == ".png"
        assert path.read_bytes() == b"bytes"
    with (
        pytest.raises(DataError, match=r"^memory://in/a\.png: is damaged$"),
        local_copy(url) as path,
    ):
        raise DataError(f"{path}: is damaged")
    assert not path.exists()


def test_errors_of_any_package_name_the_url() -> None:
    url = UrlPath("s3://bucket/a.png")
    start = r"^s3://bucket/a\.png: cannot be read "
    with pytest.raises(DataError, match=rf"{start}\(no credentials"), explain_url_errors(url):
        raise LookupError("no credentials")
    with pytest.raises(DataError, match=rf"{start}\(TimeoutError"), explain_url_errors(url):
        raise TimeoutError
    with pytest.raises(DataError, match=r"^no package$"), explain_url_errors(url):
        raise ConfigError("no package")


def test_labels_are_uploaded_last(monkeypatch: pytest.MonkeyPatch) -> None:
    out = UrlPath("memory://out")
    paths = {"labels": out / "a.png", "regions": out / "a.json", "overlay": out / "a.jpg"}
    order: list[str] = []
    put = MemoryFileSystem.pipe_file

    def note(system: MemoryFileSystem, path: str, value: bytes, **options: object) -> None:
        order.append(PurePosixPath(path).suffix)
        put(system, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", note)
    with local_outputs(paths) as local:
        for kind, path in local.items():
            path.write_text(kind)
    assert order == [".json", ".jpg", ".png"]
    assert paths["overlay"].read_bytes() == b"overlay"
    with pytest.raises(ZeroDivisionError), local_outputs({"labels": out / "b.png"}):
        raise ZeroDivisionError
    assert not (out / "b.png").exists()
