from __future__ import annotations

from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcnseg.errors import ConfigError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.parts import Part


def image(name: str) -> InputImage:
    return InputImage(Path(name), PurePath(name))


@given(
    names=st.lists(st.text("ab/1é", min_size=1, max_size=5), unique_by=lambda name: PurePath(name)),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_each_image_is_in_one_part(names: list[str], count: int, data: st.DataObject) -> None:
    images = [image(name) for name in names]
    parts = []
    for number in range(1, count + 1):  # each call may find the images in another order
        listed = data.draw(st.permutations(images))
        parts.append(Part.parse(f"{number}/{count}").select(listed))
    together = [one for part in parts for one in part]
    assert len(together) == len(images)
    assert set(together) == set(images)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_every_nth_image_in_the_order_of_names() -> None:
    images = [image(name) for name in ("d", "b", "a", "c", "e")]
    assert [str(one) for one in Part.parse("2/2").select(images)] == ["b", "d"]
    assert Part.parse("7/9").select(images) == []
    assert str(Part.parse(" 03/16 ")) == "3/16"


@pytest.mark.parametrize(
    "text", ["0/4", "5/4", "a/b", "3", "3/", "/3", "1/0", "0/0", "-1/4", "1/4/2", "1.0/4", "٣/4"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--part is .*; expected K/N with K from 1 to N"):
        Part.parse(text)
