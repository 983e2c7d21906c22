"""Words in the names of folders and files: for images, for masks, and for other files."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# User files are named in British and American English.
IMAGE_WORDS: Final = _words(
    "image images img imgs photo photos picture pictures pic pics frame frames rgb input inputs "
    "original originals orig raw sat leftimg8bit jpegimages x"
)
MASK_WORDS: Final = _words(
    "mask masks label labels annotation annotations annot annots ann anns gt gts groundtruth truth "
    "segmentation segmentations segmentationclass seg segs segmap segmaps labelmap labelmaps "
    "target targets semantic semantics matte mattes labelids labeltrainids l y"
)
# Views of the masks, and files of other tasks, in the folder of masks.
BESIDE_WORDS: Final = _words(
    "color colors colour colours colored coloured vis viz visualization visualisation overlay "
    "preview blend instanceids instance instances polygons panoptic depth"
)
# A folder "inputs" holds images; one named "x" or "l" may hold anything.
IMAGE_FOLDER_WORDS: Final = IMAGE_WORDS - {"x"}
MASK_FOLDER_WORDS: Final = MASK_WORDS - {"l", "y"} | {"json", "jsons"}
FILLER_WORDS: Final = _words("dir folder png jpg jpeg tif class set ground map maps all")
NEGATIONS: Final = _words("no non without")
