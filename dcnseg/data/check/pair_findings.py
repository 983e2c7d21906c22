"""Checks pairs apart from their classes: sizes, EXIF rotation, duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final, Literal

from dcnseg.data.check.findings import ERROR, WARNING, Finding
from dcnseg.data.check.inspection import ImageFacts, MaskFacts
from dcnseg.data.check.near_duplicates import DuplicateGroup, ImageSignature, find_near_duplicates
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.dataset import size_mismatch
from dcnseg.data.sample import Sample

_SHOWN: Final = 3  # images of a group that are listed
_TINY: Final = 32  # pixels; an output stride of 16 leaves less than 2x2 features

Fit = Literal["mismatch", "turned", "upright", "doubtful", "plain"]


def check_pairs(pairs: Sequence[InspectedPair]) -> list[Finding]:
    """Find size mismatches, ambiguous rotations, tiny images, and duplicates."""
    by_fit: dict[Fit, list[tuple[Sample, ImageFacts, MaskFacts]]] = defaultdict(list)
    for pair in pairs:
        if pair.image is not None and pair.mask is not None:
            by_fit[_fit(pair.image, pair.mask)].append((pair.sample, pair.image, pair.mask))
    turned = [sample for sample, _, _ in by_fit["turned"]]
    doubtful = [(sample, image.orientation) for sample, image, _ in by_fit["doubtful"]]
    images = [(pair, pair.image) for pair in pairs if pair.image is not None]
    signatures = [
        ImageSignature(pair.split, str(pair.sample.image), image.thumbnail, image.digest)
        for pair, image in images
    ]
    return [
        *(_mismatch(*triple) for triple in by_fit["mismatch"]),
        *_check_rotations(turned, len(by_fit["upright"]), doubtful),
        *(_tiny(pair.sample, image) for pair, image in images if min(image.size_hw) < _TINY),
        *(_several_frames(pair.sample) for pair, image in images if image.has_more_frames),
        *map(_duplicate, find_near_duplicates(signatures)),
    ]


def _fit(image: ImageFacts, mask: MaskFacts) -> Fit:
    """Return how a mask fits its image.

    "turned": only as stored, before EXIF rotation; "upright": only as displayed; "doubtful": the
    size allows both; "plain": there is no rotation.
    """
    if mask.size_hw != image.size_hw:
        is_stored = mask.size_hw == image.size_hw[::-1]
        is_turned = is_stored and image.orientation >= 5 and mask.orientation == 1
        return "turned" if is_turned else "mismatch"
    if image.orientation == 1 or mask.orientation != 1:
        return "plain"
    is_known = image.orientation >= 5 and image.size_hw[0] != image.size_hw[1]
    return "upright" if is_known else "doubtful"


def _mismatch(sample: Sample, image: ImageFacts, mask: MaskFacts) -> Finding:
    what = size_mismatch(sample, image.size_hw, mask.size_hw).removeprefix(f"{sample.mask}: ")
    advice = "Create the mask again at the size of the image; masks are not resized."
    return Finding(ERROR, "size-mismatch", str(sample.mask), what, advice)


def _check_rotations(
    turned: Sequence[Sample], num_upright: int, doubtful: Sequence[tuple[Sample, int]]
) -> list[Finding]:
    findings = []
    if turned:
        what = (
            f"fits its image only before EXIF rotation, like {len(turned)} of the masks; these "
            "masks are rotated with their images."
        )
        path = str(turned[0].mask)
        findings.append(Finding(WARNING, "mask-turned", path, what, "Check one of them."))
        return findings + [_ambiguous_rotation(*some) for some in doubtful]
    if doubtful:
        known = f", as the masks of {num_upright} other rotated images do" if num_upright else ""
        sample, orientation = doubtful[0]
        what = (
            f"has the EXIF orientation {orientation}. For {len(doubtful)} rotated or mirrored "
            "images, the mask size does not show whether the mask fits the image as displayed or "
            f"as stored; it is assumed to fit the image as displayed{known}."
        )
        advice = "If the masks fit the pixels as stored, remove the EXIF orientation of the images."
        findings.append(Finding(WARNING, "rotation-unknown", str(sample.image), what, advice))
    return findings


def _ambiguous_rotation(sample: Sample, orientation: int) -> Finding:
    what = (
        f"may fit its image, with EXIF orientation {orientation}, as displayed or as stored: the "
        "size is the same, and other masks of the data fit the pixels as stored."
    )
    advice = "Save the image and the mask with the same rotation and without an EXIF orientation."
    return Finding(ERROR, "rotation-unknown", str(sample.mask), what, advice)


def _tiny(sample: Sample, image: ImageFacts) -> Finding:
    height, width = image.size_hw
    what = f"is {width}x{height} pixels, smaller than {_TINY}; most of its crop is padding."
    advice = "Remove the image if it was added by mistake."
    return Finding(WARNING, "tiny", str(sample.image), what, advice)


def _several_frames(sample: Sample) -> Finding:
    what = "has several pages or frames; only the first is read."
    return Finding(WARNING, "several-frames", str(sample.image), what)


def _duplicate(group: DuplicateGroup) -> Finding:
    """Describe a group: of two images the second, of more the first."""
    *others, last = group.images
    first, rest = (last, others) if len(others) == 1 else (others[0], [*others[1:], last])
    is_pair, is_across = len(rest) == 1, group.is_across_splits
    if is_pair:
        how = "is the same file as" if group.is_exact else "is nearly the same image as"
    else:
        same = "are the same file:" if group.is_exact else "look nearly the same:"
        how = f"and {len(rest)} others {same}"
    names = ", ".join(f"{image.file} ({image.split})" for image in rest[:_SHOWN])
    more = f", ... and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
    keep = f"Keep {'it' if is_pair else 'them all'} in one split, or the scores will be too high."
    return Finding(
        WARNING,
        "same-image-in-two-splits" if is_across else "same-image-twice",
        first.file,
        f"({first.split}) {how} {names}{more}.",
        keep if is_across else f"Remove {'one' if is_pair else 'all but one'}.",
        tuple(image.file for image in group.images),
    )
