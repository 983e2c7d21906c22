from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dcnseg.data.pairing.name_rules import NameRule, find_name_rules, is_affix

NAMES = st.sets(st.text("abc019ü ", min_size=1, max_size=6), min_size=1, max_size=8)
SUFFIXES = st.sampled_from(["", "_L", "_mask", "-label", "_gtFine_labelIds", ".gt", "mask", "_seg"])
PREFIXES = st.sampled_from(["", "mask_", "gt_", "label-"])


def keys(names: set[str]) -> list[tuple[str, str]]:
    return [("", name) for name in sorted(names)]


def pairs(names: set[str], masks: set[str]) -> dict[str, str]:
    choice = find_name_rules(keys(names), keys(masks))
    assert len(choice.rules) == 1
    rule = choice.rules[0]
    by_key = {rule.mask_key(("", mask)): mask for mask in masks}
    found = {name: by_key.get(rule.image_key(("", name))) for name in names}
    return {name: mask for name, mask in found.items() if mask is not None}


@given(NAMES, PREFIXES, SUFFIXES)
def test_each_image_gets_its_own_mask(names: set[str], prefix: str, suffix: str) -> None:
    masks = {f"{prefix}{name}{suffix}" for name in names}
    assert pairs(names, masks) == {name: f"{prefix}{name}{suffix}" for name in names}


@given(NAMES, SUFFIXES, st.data())
def test_a_mask_that_is_gone_leaves_exactly_its_image(
    names: set[str], suffix: str, data: st.DataObject
) -> None:
    assume(len(names) > 1)
    # With names "0" and "0 ", a mask "0 _L" may be meant for either: that is refused as ambiguous.
    assume(not any(one != other and one in other for one in names for other in names))
    gone = data.draw(st.sampled_from(sorted(names)))
    masks = {name + suffix for name in names - {gone}}
    assert pairs(names, masks) == {name: name + suffix for name in names - {gone}}


@pytest.mark.parametrize(
    ("image", "mask", "rule"),
    [
        ("{}", "{}", NameRule()),
        ("{}", "{}_L", NameRule("", "", "", "_L")),
        ("{}_leftImg8bit", "{}_gt_labelIds", NameRule("", "_leftImg8bit", "", "_gt_labelIds")),
        ("img_{}", "mask_{}", NameRule("img_", "", "mask_", "")),
        ("img_{}", "{}", NameRule("img_", "", "", "")),
        ("{}_sat", "{}_mask", NameRule("", "_sat", "", "_mask")),
        ("sub/{}", "sub/gt_{}", NameRule("", "", "gt_", "")),
        ("{}", "{}_1", NameRule("", "", "", "_1")),
    ],
)
def test_rules_are_found_in_the_names(image: str, mask: str, rule: NameRule) -> None:
    numbers = ["0001", "0002", "0010", "0100"]
    choice = find_name_rules(
        [("train", image.format(n)) for n in numbers], [("train", mask.format(n)) for n in numbers]
    )
    assert (choice.rules, choice.pairs) == ((rule,), 4)


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        # With a suffix "1", 1 -> 11 and 11 -> 111 would pair all files.
        ("1 11", "11 111", {"11": "11"}),
        # A suffix that leaves files unpaired needs a separator and a letter.
        ("a b c", "a_1 b_1", {}),
        ("a b c", "a_x b_x", {"a": "a_x", "b": "b_x"}),
        # Different places do not pair by their numbers.
        ("bremen_1 bremen_2", "ulm_1 ulm_2", {}),
    ],
)
def test_implausible_affixes_pair_nothing(
    images: str, masks: str, expected: dict[str, str]
) -> None:
    assert pairs(set(images.split()), set(masks.split())) == expected


def test_affixes() -> None:
    assert [text for text in ("_L", "mask", "1", "a", "_1") if is_affix(text)] == ["_L", "mask"]


def test_views_of_the_masks_are_not_masks() -> None:
    names = [("", "a"), ("", "b")]
    masks = [("", f"{n}_{kind}") for n in "ab" for kind in ("labelIds", "color", "instanceIds")]
    choice = find_name_rules(names, masks)
    assert choice.rules == (NameRule("", "", "", "_labelIds"),)
    assert choice.is_beside(("", "a_color"))
    assert not choice.is_beside(("", "c"))
    choice = find_name_rules(names, [*names, ("", "a_color"), ("", "b_color")])
    assert choice.rules == (NameRule(),)
    assert choice.is_beside(("", "a_color"))


def test_train_ids_go_before_ids() -> None:
    masks = [("", f"{n}_{kind}") for n in "ab" for kind in ("labelIds", "labelTrainIds")]
    choice = find_name_rules([("", "a"), ("", "b")], masks)
    assert choice.rules == (NameRule("", "", "", "_labelTrainIds"),)
    assert choice.is_beside(("", "a_labelIds"))


def test_rules_in_words() -> None:
    assert NameRule().describe() == "by name"
    rule = NameRule("", "_sat", "", "_mask")
    assert rule.describe() == "with image suffix _sat and mask suffix _mask"
