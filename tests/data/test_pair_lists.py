from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnseg.config import PairSource
from dcnseg.data.pairing.folders import find_splits
from dcnseg.errors import DataError
from tests.data.helpers import by_split, touch
from tests.data.json_garbage import result_or_message


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    touch(root, "i/a.jpg", "i/b c.jpg", "i/d.jpg", "m/1.png", "m/2, new.png", "m/3.png")
    return root


def read(root: Path, text: str, folder: Path | None = None) -> dict[str, dict[str, str]]:
    path = (folder or root) / "list.csv"
    path.write_text(text, encoding="utf-8")
    return {
        name: {sample.stem: sample.mask.name for sample in samples}
        for name, samples in by_split(root, PairSource(pairs=path)).items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "i/a.jpg,m/1.png\ni/d.jpg,m/3.png\n",
        "image,mask\ni/a.jpg,m/1.png\ni/d.jpg,m/3.png\n",
        "\ufeffmask;image\r\nm/1.png;i/a.jpg\r\n\r\nm/3.png;i/d.jpg\r\n",
        "i/a.jpg\tm/1.png\ni/d.jpg\tm/3.png",
        "# a comment\ni/a.jpg  m/1.png\n  i/d.jpg m/3.png",
        "id,label_path,img_path\n1,m/1.png,i/a.jpg\n2,m/3.png,i/d.jpg\n",
    ],
)
def test_lists_in_many_forms(data: Path, text: str) -> None:
    assert read(data, text) == {"train": {"i/a": "1.png", "i/d": "3.png"}}


@pytest.mark.parametrize(
    "text",
    ['"i/b c.jpg" "m/2, new.png"\n', 'i/b c.jpg,"m/2, new.png"\n', "i/b c.jpg\tm/2, new.png\n"],
)
def test_quotes_keep_blanks_and_commas(data: Path, text: str) -> None:
    assert read(data, text) == {"train": {"i/b c": "2, new.png"}}


def test_splits_in_the_third_column(data: Path) -> None:
    text = "image,mask,split\ni/a.jpg,m/1.png,training\ni/d.jpg,m/3.png,Valid\n"
    assert read(data, text) == {"train": {"i/a": "1.png"}, "val": {"i/d": "3.png"}}


def test_paths_are_relative_to_the_list_or_else_to_the_data(data: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "1.png").touch()
    found = read(data, f"i/a.jpg,1.png\n{data}/i/d.jpg,m/3.png\n", lists)
    assert found == {"train": {"i/a": "1.png", "i/d": "3.png"}}


def test_names_that_differ_in_their_ending_stay_apart(data: Path) -> None:
    (data / "i/a.png").touch()
    found = read(data, "i/a.jpg,m/1.png\ni/a.png,m/3.png\ni/d.jpg,m/3.png\n")
    expected = {"i/a.jpg": "1.png", "i/a.png": "3.png", "i/d": "3.png"}  # one mask may serve two
    assert found == {"train": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no pairs"),
        ("image,mask\n", "has no pairs"),
        ("i/a.jpg,m/1.png\ni/d.jpg,\n", "line 2 has 1 columns"),
        ("i/a.jpg,m/1.png,fold1\n", "line 1 has the split 'fold1'"),
        ("i/a.jpg,m/1.png,val\ni/d.jpg,m/3.png,\n", "line 2 has no split, but other lines have"),
        ("i/a.jpg,m/9.png\ni/x.jpg,m/1.png\n", "2 of the listed .*line 1: .*9.png, line 2: .*x.j"),
        ("i/a.jpg,m/1.png\n./i/a.jpg,m/3.png\n", "lines 1 and 2 both name .*a.jpg"),
    ],
)
def test_wrong_lists_are_refused_by_line(data: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(data, text)


def test_a_list_or_entry_that_cannot_be_read_is_named(data: Path) -> None:
    (data / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    os.mkfifo(data / "fifo.csv")
    for name, message in (
        ("no", r"cannot be read \(No such file"),
        ("bytes", "is not a readable list of pairs"),
        ("fifo", r"cannot be read \(not a regular file"),
    ):
        with pytest.raises(DataError, match=rf"{name}\.csv: {message}"):
            find_splits(data, PairSource(pairs=data / f"{name}.csv"))
    os.mkfifo(data / "i" / "x.jpg")
    with pytest.raises(DataError, match=r"missing or are not regular files \(line 1: .*x\.jpg\)"):
        read(data, "i/x.jpg,m/1.png\n")


def test_a_name_that_no_file_system_takes_is_missing(data: Path) -> None:
    with pytest.raises(DataError, match=r"2 of the listed files are missing") as caught:
        read(data, f"{'x' * 5000}.jpg,a\0b.png\n")
    assert len(str(caught.value)) < 1000


WORDS = ("i/a.jpg", "m/1.png", "train", "val", "image", "mask", "split", "", ".", "/", "..", "~")
CELLS = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(
    st.lists(st.lists(CELLS, max_size=4), max_size=4),
    st.sampled_from([",", ";", "\t", " ", ", "]),
    st.sampled_from(["\n", "\r\n", "\x85", '"\n']),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_list_holds_is_pairs_or_an_error(
    data: Path, rows: list[list[str]], delimiter: str, end: str
) -> None:
    text = end.join(delimiter.join(row) for row in rows)
    splits, message = result_or_message(lambda: read(data, text))
    if splits is None:
        assert message.startswith(str(data))
    else:
        assert {mask for split in splits.values() for mask in split.values()} <= {"1.png", "a.jpg"}
