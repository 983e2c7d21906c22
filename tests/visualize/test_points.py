from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.errors import ConfigError
from dcnseg.visualize.points import NamedPoint, check_points, choose_points, make_grid_points

POINTS_OUTSIDE = [(64.0, 10.0), (-0.5, 0), (0, -1), (64, 0), (0, 48), (math.nan, 0)]


def test_background_small_and_large_object() -> None:
    labels = np.zeros((120, 200), np.uint8)
    cv2.circle(labels, (40, 50), 30, 1, -1)
    cv2.circle(labels, (160, 30), 12, 3, -1)
    cv2.circle(labels, (160, 90), 20, 2, -1)
    labels[0:4, 0:5] = 2  # 20 pixels are an object, but here, 12 are 0.05 % of the image
    labels[115, 0:11] = 2  # 11 are not
    points = choose_points(labels, SCENE_CLASSES)
    names = SCENE_CLASSES.names
    assert [point.name for point in points] == [
        "background",
        f"small object, {names[2]}",
        f"large object, {names[1]}",
    ]
    x, y = points[0].xy
    assert labels[int(y), int(x)] == 0
    # No object, and no border of the image, is within the clearance of the best place.
    clearance = min(x + 1, y + 1, 200 - x, 120 - y)
    ys, xs = np.nonzero(labels)
    clearance = min(clearance, np.hypot(xs - x, ys - y).min())
    assert clearance > 25
    assert points[2].xy == (40, 50)


def test_innermost_pixel_of_an_object_at_the_border() -> None:
    labels = np.zeros((60, 60), np.uint8)
    labels[20:41, 0:31] = 1
    (_, point) = choose_points(labels, SCENE_CLASSES)
    assert point.name == f"single object, {SCENE_CLASSES.names[1]}"
    assert point.xy[1] == 30
    assert 10 <= point.xy[0] <= 20  # the border of the image is one of the object


def test_noise_is_no_small_object() -> None:
    labels = np.zeros((400, 400), np.uint8)
    labels[10:15, 10:15] = 1  # 25 of 160000 pixels
    labels[100:130, 100:130] = 2
    labels[200:300, 200:300] = 3
    assert choose_points(labels, SCENE_CLASSES)[1].xy == pytest.approx((114.5, 114.5), abs=1)
    labels[50:] = 0
    assert choose_points(labels, SCENE_CLASSES)[1].xy == (12, 12)  # there is no other


def test_without_a_background_there_are_two_points() -> None:
    classes = ClassMap((ClassInfo(0, "road", (0, 0, 0)), ClassInfo(1, "car", (255, 0, 0))))
    labels = np.zeros((60, 60), np.uint8)
    labels[20:40, 20:40] = 1
    names = [point.name for point in choose_points(labels, classes)]
    assert names == ["small object, car", "large object, road"]


def test_without_objects_there_is_a_grid() -> None:
    points = choose_points(np.zeros((360, 480), np.uint8), SCENE_CLASSES)
    assert [point.xy for point in points] == make_grid_points((360, 480))
    assert points[0].title == "(80, 60)"
    assert NamedPoint((3, 4.5), "background").title == "background (3, 4.5)"


def test_make_grid_points() -> None:
    points = [(16, 12), (48, 12), (16, 36), (48, 36)]
    assert make_grid_points((48, 64), columns=2, rows=2) == points
    assert len(make_grid_points((360, 480))) == 9
    assert make_grid_points((1, 1)) == [(0, 0)]
    for size_hw in ((1, 1), (2, 7), (360, 480)):
        check_points(make_grid_points(size_hw), size_hw)


def test_points_outside_the_image() -> None:
    for point in POINTS_OUTSIDE:
        with pytest.raises(ConfigError, match="outside the image of 64x48"):
            check_points([(5.0, 5.0), point], (48, 64))
    with pytest.raises(ConfigError, match=r"64,10 .* 64x48 .* 0\.\.63 and y in 0\.\.47"):
        check_points(POINTS_OUTSIDE, (48, 64))
