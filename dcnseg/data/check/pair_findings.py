"""Checks pairs apart from their classes: sizes, EXIF rotation, duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dcnseg.data.check.findings import ERROR, WARNING, Finding
from dcnseg.data.check.near_duplicates import DuplicateGroup, ImageSignature, find_near_duplicates
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.dataset import size_mismatch

_SHOWN: Final = 3  # images of a group that are listed
_TINY: Final = 32  # pixels; an output stride of 16 leaves less than 2x2 features


def check_pairs(pairs: Sequence[InspectedPair]) -> list[Finding]:
    """Find size mismatches, ambiguous rotations, tiny images, and duplicates.

    Args:
        pairs: Every pair of the data.
    """
    findings: list[Finding] = []
    is_turned: list[InspectedPair] = []
    is_upright: list[InspectedPair] = []
    is_doubtful: list[InspectedPair] = []
    for pair in pairs:
        if pair.image is None or pair.mask is None:
            continue
        fit = _fit(pair)
        if fit == "none":
            findings.append(_mismatch(pair))
        elif fit == "stored":
            is_turned.append(pair)
        elif pair.image.orientation != 1 and pair.mask.orientation == 1:
            is_known = fit == "shown" and _is_on_its_side(pair)
            (is_upright if is_known else is_doubtful).append(pair)
    return (
        findings
        + _check_rotations(is_turned, is_upright, is_doubtful)
        + _find_tiny(pairs)
        + _find_several_frames(pairs)
        + _find_duplicates(pairs)
    )


def _is_on_its_side(pair: InspectedPair) -> bool:
    assert pair.image is not None
    return pair.image.orientation >= 5 and pair.image.size_hw[0] != pair.image.size_hw[1]


def _fit(pair: InspectedPair) -> str:
    """Whether the mask fits the image as "shown", only as "stored", or "none"."""
    assert pair.image is not None
    assert pair.mask is not None
    if pair.mask.size_hw == pair.image.size_hw:
        return "shown"
    is_stored = pair.mask.size_hw == pair.image.size_hw[::-1]
    if is_stored and pair.image.orientation >= 5 and pair.mask.orientation == 1:
        return "stored"
    return "none"


def _mismatch(pair: InspectedPair) -> Finding:
    assert pair.image is not None
    assert pair.mask is not None
    text = size_mismatch(pair.sample, pair.image.size_hw, pair.mask.size_hw)
    what = text.removeprefix(f"{pair.sample.mask}: ")
    advice = "Create the mask again at the size of the image; masks are not resized."
    return Finding(ERROR, "size-mismatch", str(pair.sample.mask), what, advice)


def _check_rotations(
    turned: Sequence[InspectedPair],
    upright: Sequence[InspectedPair],
    doubtful: Sequence[InspectedPair],
) -> list[Finding]:
    findings = []
    if turned:
        findings.append(
            Finding(
                WARNING,
                "mask-turned",
                str(turned[0].sample.mask),
                f"fits its image only as stored, before EXIF rotation, like {len(turned)} of the "
                "masks; these are rotated with their images.",
                "Verify one of them.",
            )
        )
    if doubtful and turned:
        findings += [_ambiguous_rotation(pair) for pair in doubtful]
    elif doubtful:
        known = f" (the masks of {len(upright)} rotated images fit so)" if upright else ""
        first = doubtful[0]
        assert first.image is not None
        findings.append(
            Finding(
                WARNING,
                "rotation-unknown",
                str(first.sample.image),
                f"has the EXIF orientation {first.image.orientation}. For {len(doubtful)} rotated "
                "or mirrored images the mask size does not show whether the mask fits the image as "
                f"displayed or as stored; it is taken as displayed{known}.",
                "If the masks fit the pixels as stored, remove the EXIF orientation of the images.",
            )
        )
    return findings


def _ambiguous_rotation(pair: InspectedPair) -> Finding:
    assert pair.image is not None
    return Finding(
        ERROR,
        "rotation-unknown",
        str(pair.sample.mask),
        f"may fit its image, with EXIF orientation {pair.image.orientation}, as displayed or as "
        "stored: the size is the same, and other masks of the data fit the pixels as stored.",
        "Save image and mask without EXIF orientation, with the same rotation.",
    )


def _find_tiny(pairs: Sequence[InspectedPair]) -> list[Finding]:
    found = []
    for pair in pairs:
        if pair.image is not None and min(pair.image.size_hw) < _TINY:
            height, width = pair.image.size_hw
            what = f"is {width}x{height} pixels, smaller than {_TINY}; most of its crop is padding."
            advice = "Remove it if it is there by mistake."
            found.append(Finding(WARNING, "tiny", str(pair.sample.image), what, advice))
    return found


def _find_several_frames(pairs: Sequence[InspectedPair]) -> list[Finding]:
    what = "has several pages or frames; only the first is read."
    return [
        Finding(WARNING, "several-frames", str(pair.sample.image), what)
        for pair in pairs
        if pair.image is not None and pair.image.has_more_frames
    ]


def _find_duplicates(pairs: Sequence[InspectedPair]) -> list[Finding]:
    images = [
        ImageSignature(pair.split, str(pair.sample.image), pair.image.thumbnail, pair.image.digest)
        for pair in pairs
        if pair.image is not None
    ]
    return [_duplicate(group) for group in find_near_duplicates(images)]


def _duplicate(group: DuplicateGroup) -> Finding:
    """Describe a group: of two images the second, of more the first."""
    *others, last = group.images
    first, rest = (last, others) if len(others) == 1 else (others[0], [*others[1:], last])
    if len(rest) == 1:
        how = "is the same file as" if group.is_exact else "is nearly the same image as"
    elif group.is_exact:
        how = f"and {len(rest)} others are the same file:"
    else:
        how = f"and {len(rest)} others look nearly the same:"
    names = ", ".join(f"{image.file} ({image.split})" for image in rest[:_SHOWN])
    more = f", ... and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
    is_across = group.is_across_splits
    keep = "it" if len(rest) == 1 else "them all"
    return Finding(
        WARNING,
        "same-image-in-two-splits" if is_across else "same-image-twice",
        first.file,
        f"({first.split}) {how} {names}{more}.",
        f"Keep {keep} in one split, or the scores will be too high."
        if is_across
        else f"Remove {'one' if len(rest) == 1 else 'all but one'}.",
        tuple(image.file for image in group.images),
    )
