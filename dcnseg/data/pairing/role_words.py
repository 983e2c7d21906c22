"""The words that folders and files are named by: for images, for masks, for what lies beside."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGE_WORDS: Final = _words(
    "image images img imgs photo photos image images pic pics frame frames rgb input inputs "
    "original originals orig raw sat leftimg8bit jpegimages x"
)
MASK_WORDS: Final = _words(
    "mask masks label labels annotation annotations annot annots ann anns gt gts groundtruth truth "
    "segmentation segmentations segmentationclass seg segs segmap segmaps labelmap labelmaps "
    "target targets semantic semantics matte mattes labelids labeltrainids l y"
)
# Images of masks for people, and files of other tasks, that stand beside the masks.
BESIDE_WORDS: Final = _words(
    "color colors color colors colored colored vis viz visualization visualization overlay "
    "preview blend instanceids instance instances polygons panoptic depth"
)
# A folder "inputs" holds images, but one that is called "x" or "l" says nothing.
IMAGE_FOLDER_WORDS: Final = IMAGE_WORDS - {"x"}
MASK_FOLDER_WORDS: Final = MASK_WORDS - {"l", "y"} | {"json", "jsons"}
FILLER_WORDS: Final = _words("dir folder png jpg jpeg tif class set ground map maps all")
NEGATIONS: Final = _words("no non without")
