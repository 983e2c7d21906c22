from __future__ import annotations

import pytest

from dcnseg.engine.compared_runs import Difference
from dcnseg.scoring.bootstrap import Interval

FIXED = "dilation4, the best fixed grid"


@pytest.mark.parametrize(
    ("interval", "is_overlapping", "runs", "images", "text"),
    [
        (
            *(Interval(0.021, 0.013, 0.029), False, 3, 50),
            f"deformable is better than {FIXED}, by 0.021 mIoU (95 % CI 0.013 to 0.029, 3 seeds).",
        ),
        (
            *(Interval(-0.021, -0.029, -0.013), False, 2, 50),
            f"deformable is worse than {FIXED}, by 0.021 mIoU (95 % CI -0.029 to -0.013, 2 seeds).",
        ),
        (
            *(Interval(0.021, 0.013, 0.029), False, 1, 50),
            f"deformable scored 0.021 mIoU higher than {FIXED}, in one run each. One run does not "
            "show a difference; compare several with --seeds.",
        ),
        (
            *(Interval(0.021, -0.001, 0.029), False, 3, 50),
            f"No difference could be shown between deformable and {FIXED}: +0.021 mIoU (95 % CI "
            "-0.001 to 0.029, 3 seeds).",
        ),
        (
            *(Interval(0.021, 0.013, 0.029), True, 3, 50),
            f"No difference could be shown between deformable and {FIXED}: +0.021 mIoU (95 % CI "
            "0.013 to 0.029, 3 seeds; the scores of their runs overlap).",
        ),
        (
            *(Interval(0.021, 0.013, 0.029), False, 3, 9),
            f"No difference could be shown between deformable and {FIXED}: +0.021 mIoU (9 images "
            "are too few).",
        ),
    ],
)
def test_the_sentence_says_how_sure_the_difference_is(
    interval: Interval, is_overlapping: bool, runs: int, images: int, text: str
) -> None:
    difference = Difference("deformable", "dilation4", interval, is_overlapping, runs, images)
    assert difference.describe(", the best fixed grid,") == text
    assert difference.is_conclusive == ("could" not in text and "one run" not in text)
