from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.synthetic import SCENE_CLASSES, generate_scene
from dcnseg.errors import ConfigError, NotFiniteError, ShapeError
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter
from dcnseg.ops.offset_stats import OffsetStatistics, TapGrid
from dcnseg.visualize.explorer import payload
from dcnseg.visualize.explorer.page import (
    MODULES,
    ExplorerContent,
    GalleryEntry,
    bundle_modules,
    write_explorer,
    write_explorer_page,
    write_gallery,
)
from dcnseg.visualize.explorer.payload import (
    MASK_NOT_FINITE,
    MASK_STEPS,
    MAX_ERROR_PX,
    NOT_FINITE,
    compute_error_px,
    quantize_offset,
    select_layers,
)
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.measures.measuring import OffsetSums
from dcnseg.visualize.measures.pixel_groups import IGNORED, OUTSIDE
from dcnseg.visualize.measures.results import ALL, OBJECTS, SIZE
from dcnseg.visualize.offsets import (
    CASCADE_DEPTH,
    LayerOffsets,
    capture_offsets,
    compute_effective_dilation,
    trace_cascade,
)

UInt8Array = npt.NDArray[np.uint8]
Open = Callable[..., AbstractContextManager[Any]]

DOCS = Path(__file__).parents[2] / "docs" / "offsets.md"
ASSETS = Path(payload.__file__).parent / "assets"
TIMEOUT = 120_000  # milliseconds; a busy machine is slow
SIZE_HW = (97, 131)
NO_STATISTICS = OffsetStatistics(0.0, 0.0, 0.0, 0.0)


def make_layer(
    seed: int,
    map_hw: tuple[int, int] = (13, 17),
    *,
    groups: int = 1,
    is_modulated: bool = False,
    stride_px: float = 8.0,
    spread: float = 2.0,
) -> LayerOffsets:
    """A layer with random offsets on a map of stride 8."""
    generator = torch.Generator().manual_seed(seed)
    offset = spread * torch.randn(groups, 9, 2, *map_hw, generator=generator)
    mask = 2 * torch.rand(groups, 9, *map_hw, generator=generator) if is_modulated else None
    grid = TapGrid((3, 3), (1, 1), (2, 2), (2, 2))
    geometry = MapGeometry((stride_px, stride_px), (0.5, -1.5))
    name = f"encoder.layer{seed}.conv"
    return LayerOffsets(name, offset, mask, grid, map_hw, geometry, NO_STATISTICS)


def make_layers(count: int = 3, **options: Any) -> list[LayerOffsets]:
    return [make_layer(seed, **options) for seed in range(count)]


def as_embedded(layer: LayerOffsets) -> LayerOffsets:
    """The layer as the page has it: its offsets and modulation with their limited precision."""
    steps, unit = quantize_offset(layer)
    offset = torch.from_numpy(steps.astype(np.float32)) * unit
    if steps.dtype == np.int16:
        offset[torch.from_numpy(steps) == NOT_FINITE] = torch.nan
    mask = layer.mask
    if mask is not None:
        rounded = (mask * MASK_STEPS).round() / MASK_STEPS
        mask = torch.where(mask.isnan(), torch.nan, rounded)
    return replace(layer, offset=offset, mask=mask)


def make_image(size_hw: tuple[int, int] = SIZE_HW) -> UInt8Array:
    return np.random.default_rng(0).integers(60, 200, (*size_hw, 3)).astype(np.uint8)


def make_labels(size_hw: tuple[int, int] = SIZE_HW, seed: int = 0) -> UInt8Array:
    """Blobs of the classes and of ignored pixels."""
    coarse = np.random.default_rng(seed).choice([0, 0, 1, 2, 3, 255], (8, 9)).astype(np.uint8)
    rows, columns = (np.arange(n) * c // n for n, c in zip(size_hw, coarse.shape, strict=True))
    return coarse[np.ix_(rows, columns)]


def number_objects(labels: UInt8Array) -> npt.NDArray[np.int64]:
    """Objects of at least 16 pixels from 1, 0 for smaller ones, -1 where ignored."""
    parts = cc3d.connected_components(labels.astype(np.uint16) + 1, connectivity=8)
    found = np.where(np.bincount(parts.ravel())[parts] >= 16, parts, 0).astype(np.int64)
    found[labels == 0] = 1 + found.max()  # the background as a whole
    found[labels == 255] = -1
    return found


def make_content(layers: Sequence[LayerOffsets], **changes: Any) -> ExplorerContent:
    content = ExplorerContent(
        "scene", make_image(), layers, SCENE_CLASSES, make_labels(seed=1), make_labels()
    )
    return replace(content, **changes)


@pytest.fixture(scope="module")
def open_page(browser: Any) -> Open:
    """Open a page offline, and assert that it has no problem and requests nothing."""

    @contextmanager
    def open_page(path: Path, hash_: str = "", **options: Any) -> Iterator[Any]:
        settings = {"viewport": {"width": 1200, "height": 860}, "offline": True} | options
        context = browser.new_context(**settings)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        problems: list[str] = []
        page.on("console", lambda entry: problems.append(entry.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri() + hash_)
        page.wait_for_selector("html[data-ready]", state="attached")
        yield page
        assert problems == []
        urls = [url.split("#")[0] for url in requested if not url.startswith("data:")]
        assert urls == [path.as_uri()]
        context.close()

    return open_page


@pytest.fixture(scope="module")
def simple_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with three layers and modulation; `browser` skips early where there is none."""
    path = tmp_path_factory.mktemp("explorer") / "scene.html"
    write_explorer_page(path, make_content(make_layers(is_modulated=True)))
    return path


def get_state(page: Any) -> dict[str, Any]:
    state: dict[str, Any] = page.evaluate("dcnsegExplorer.state()")
    return state


def wait_for(page: Any, condition: str) -> None:
    """Wait until an expression is true; the page's policy forbids Playwright's own function."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def wait_for_state(page: Any, condition: str) -> None:
    """Wait until a condition on the state `s` is true and drawn."""
    wait_for(page, f"(() => {{ const s = dcnsegExplorer.state(); return {condition}; }})()")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def assert_points_match(page: Any, layers: Sequence[LayerOffsets], size_hw: Sequence[int]) -> None:
    """Compare the page's points with `trace_cascade`, for each layer and in cascade."""
    height, width = size_hw
    points = [(0.0, 0.0), (width - 1.0, height - 1.0), (0.43 * width, 0.57 * height), (-9.3, 31.7)]
    embedded = [as_embedded(layer) for layer in layers]
    for last in range(len(layers)):
        for is_cascade in (False, True):
            used = slice(max(0, last - CASCADE_DEPTH + 1) if is_cascade else last, last + 1)
            options = {"layer": last, "cascade": is_cascade}
            found = page.evaluate(
                "([points, o]) => points.map(([x, y]) =>"
                " [dcnsegExplorer.pointsAt(x, y, o), dcnsegExplorer.plainAt(x, y, o),"
                "  dcnsegExplorer.numbersAt(x, y, o).location])",
                [points, options],
            )
            for point, (drawn, plain, location) in zip(points, found, strict=True):
                expected = trace_cascade(embedded[used], point)
                assert_same(drawn, expected.positions_xy, expected.weights)
                assert (location["x"], location["y"]) == pytest.approx(expected.location_xy)
                grid = trace_cascade(layers[used], point, is_plain=True)
                assert_same(plain, grid.positions_xy, grid.weights)
                # On the border of two locations, the limited precision may choose the other one.
                exact = trace_cascade(layers[used], point)
                error = torch.tensor(drawn)[:, :2].sub(exact.positions_xy).abs().amax(1)
                assert (error <= MAX_ERROR_PX).double().mean() >= (0.99 if is_cascade else 1.0)


def assert_same(drawn: list[list[float]], positions: Tensor, weights: Tensor) -> None:
    found = torch.tensor(drawn, dtype=torch.float64)
    torch.testing.assert_close(found[:, :2], positions, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 2], weights.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("groups", "is_modulated"), [(1, False), (2, False), (1, True), (2, True)])
def test_points_match_python(
    open_page: Open, tmp_path: Path, groups: int, is_modulated: bool
) -> None:
    layers = make_layers(groups=groups, is_modulated=is_modulated)
    write_explorer_page(tmp_path / "page.html", make_content(layers))
    with open_page(tmp_path / "page.html") as page:
        assert_points_match(page, layers, SIZE_HW)


def make_predictor(input_scale: float) -> Predictor:
    torch.manual_seed(3)
    config = ModelConfig(
        architecture="plain", encoder="resnet18", encoder_depth=3, deform_layers=3, modulated=True
    )
    model = build_segmenter(config, SCENE_CLASSES.num_classes).eval()
    for layer in model.deformable_layers().values():
        assert layer.conv_offset.bias is not None
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.02)
        torch.nn.init.normal_(layer.conv_offset.bias, std=0.7)
    preprocessing = Preprocessing(input_scale=input_scale)
    return Predictor(model, SCENE_CLASSES, preprocessing, device=torch.device("cpu"))


@pytest.mark.parametrize("input_scale", [1.0, 0.5])
def test_points_of_a_network_match_python(
    open_page: Open, tmp_path: Path, input_scale: float
) -> None:
    predictor = make_predictor(input_scale)
    image = generate_scene(1, SIZE_HW)[0]
    path = tmp_path / "page.html"
    write_explorer(path, predictor, image, title="a", pins=[(40.0, 30.0)], is_cascade=True)
    layers = capture_offsets(predictor.model, predictor.prepare(image), SIZE_HW)
    assert max(layer.statistics.mean_px for layer in layers) > 0.3
    with open_page(path) as page:
        assert_points_match(page, layers, SIZE_HW)
        nearest = trace_cascade(layers[-1:], (40.0, 30.0)).location_xy
        assert [tuple(pin.values()) for pin in get_state(page)["pins"]] == [nearest]
        assert get_state(page)["cascade"]
        predicted = page.evaluate("dcnsegExplorer.numbersAt(40, 30).predicted")
        x, y = (int(value + 0.5) for value in nearest)
        assert predicted == predictor.predict(image).labels[y, x]
        assert not page.locator('[data-number="true"]').count()


def test_heat_maps_and_numbers_match_python(open_page: Open, simple_page: Path) -> None:
    layers = [as_embedded(layer) for layer in make_layers(is_modulated=True)]
    labels = make_labels()
    objects = number_objects(labels)
    point = (50.0, 54.0)
    cascade = trace_cascade(layers, point)
    with open_page(simple_page) as page:
        for i, layer in enumerate(layers):
            assert layer.mask is not None
            lengths = 8 * torch.linalg.vector_norm(layer.offset.double(), dim=2).mean((0, 1))
            for name, expected in (
                ("dilation", compute_effective_dilation(layer)),
                ("length", lengths),
                ("modulation", layer.mask.double().mean((0, 1))),
            ):
                found = page.evaluate("([n, i]) => dcnsegExplorer.heatValues(n, i)", [name, i])
                torch.testing.assert_close(
                    torch.tensor(found, dtype=torch.float64),
                    expected.flatten(),
                    atol=1e-5,
                    rtol=1e-6,
                )
        numbers = page.evaluate("dcnsegExplorer.numbersAt(50, 54, {layer: 2, cascade: true})")
    center = tuple(int(value + 0.5) for value in cascade.location_xy[::-1])
    assert labels[center] not in (0, 255)  # otherwise there is nothing to check
    assert numbers["truth"] == labels[center]
    assert numbers["predicted"] == make_labels(seed=1)[center]
    assert numbers["plainDilation"] == 16
    for i, samples in enumerate((cascade, trace_cascade(layers, point, is_plain=True))):
        columns, rows = (samples.positions_xy + 0.5).floor().long().T.numpy()
        is_inside = (rows >= 0) & (rows < SIZE_HW[0]) & (columns >= 0) & (columns < SIZE_HW[1])
        found = np.full(len(rows), -2)
        found[is_inside] = objects[rows[is_inside], columns[is_inside]]
        weights = samples.weights.double().numpy() * (found != -1)
        share = ((found == objects[center]) * weights).sum() / weights.sum()
        assert numbers["outside"][i] == pytest.approx(1 - is_inside.mean())
        assert numbers["onTrue"][i] == pytest.approx(share)
        assert 0 < numbers["onTrue"][i] < 1
        assert (found == -1).any()


def test_shares_on_objects_are_those_of_the_measures(open_page: Open, tmp_path: Path) -> None:
    layer = make_layer(2)
    labels = np.where(make_labels() == 255, 0, make_labels()).astype(np.uint8)
    labels[50:65, 16:31] = 0
    labels[56:59, 22:25] = 3  # too small to be an object
    write_explorer_page(tmp_path / "page.html", make_content([layer], labels=labels))
    places = np.stack(np.meshgrid(np.arange(17), np.arange(13)), -1).reshape(-1, 2)
    locations = 8 * places + (-1.5, 0.5)
    with open_page(tmp_path / "page.html") as page:
        shares = np.array(
            page.evaluate(
                "(points) => points.map(([x, y]) => dcnsegExplorer.numbersAt(x, y).onTrue)",
                locations.tolist(),
            )
        )
        start = get_state(page)["point"]
    columns, rows = np.floor(locations + 0.5).astype(int).T
    is_inside = (rows >= 0) & (rows < SIZE_HW[0]) & (columns >= 0) & (columns < SIZE_HW[1])
    objects = number_objects(labels)
    centers = np.where(is_inside, objects[rows % SIZE_HW[0], columns % SIZE_HW[1]], -2)
    assert {-2, 0} < set(centers.tolist())
    assert np.isnan(shares[:, 0]).tolist() == (centers <= 0).tolist()
    sums = OffsetSums(SCENE_CLASSES)
    sums.add([as_embedded(layer)], labels)
    groups = sums.result().layers[0].groups
    background = objects[labels == 0][0]
    for is_chosen, group in (
        ((centers > 0) & (centers != background), groups[ALL][OBJECTS]),
        (centers == background, groups[SIZE]["background"]),
    ):
        assert is_chosen.sum() == group.locations > 20
        assert shares[is_chosen].mean(0) == pytest.approx(
            [group.on_object.own, group.on_object.plain]
        )
    areas = np.bincount(objects[labels > 0])
    assert areas[objects[int(start["y"]), int(start["x"])]] == areas.max()


def test_pointer_moves_and_pins(open_page: Open, simple_page: Path) -> None:
    with open_page(simple_page) as page:
        box = page.locator("#stage").bounding_box()
        drawn = page.evaluate("dcnsegExplorer.drawnPoints()")
        state = get_state(page)
        x, y = state["point"]["x"], state["point"]["y"]
        expected = page.evaluate("([x, y]) => dcnsegExplorer.pointsAt(x, y)", [x, y])
        # Two points tell the scale of the stage, and all others must agree with it.
        drawn_xy, image_xy = np.array(drawn), np.array(expected)[:, :2]
        scale = np.ptp(drawn_xy[:, 0]) / np.ptp(image_xy[:, 0])
        shift = drawn_xy[0] - scale * image_xy[0]
        assert drawn_xy == pytest.approx(scale * image_xy + shift, abs=0.01)
        alpha = page.evaluate(
            "(points) => {"
            " const canvas = document.getElementById('points');"
            " const ratio = canvas.width / canvas.clientWidth;"
            " const whole = [0, 0, canvas.width, canvas.height];"
            " const { data } = canvas.getContext('2d').getImageData(...whole);"
            " const at = (x, y) => Math.floor(y * ratio) * canvas.width + Math.floor(x * ratio);"
            " return points.map(([x, y]) => data[4 * at(x, y) + 3]); }",
            drawn,
        )
        assert len(alpha) == 9
        assert min(alpha) > 0

        def on_page(image_x: float, image_y: float) -> tuple[float, float]:
            return (
                box["x"] + scale * image_x + float(shift[0]),
                box["y"] + scale * image_y + float(shift[1]),
            )

        page.mouse.move(*on_page(30, 20))
        wait_for_state(page, "Math.hypot(s.point.x - 30, s.point.y - 20) < 0.5")
        nearest = trace_cascade(make_layers()[-1:], (30, 20)).location_xy
        assert page.inner_text("#place") == ", ".join(f"{value:.1f}" for value in nearest)
        page.mouse.down()
        page.mouse.up()
        wait_for_state(page, "s.pins.length === 1")
        page.mouse.move(*on_page(100, 70))
        page.mouse.down()
        page.mouse.up()
        wait_for_state(page, "s.pins.length === 2")
        assert get_state(page)["pins"][0] == {"x": nearest[0], "y": nearest[1]}
        assert page.locator("#pins tr").count() == 2
        page.mouse.down()
        page.mouse.up()
        wait_for_state(page, "s.pins.length === 1")
        page.locator(".pin-remove").click()
        wait_for_state(page, "s.pins.length === 0")


def test_keyboard(open_page: Open, simple_page: Path) -> None:
    with open_page(simple_page, "#layer=3&point=63,65") as page:
        press = page.keyboard.press
        page.focus("#stage")
        assert page.evaluate("document.activeElement.matches(':focus-visible')")
        press("2")
        wait_for_state(page, "s.layer === 1")
        press("ArrowRight")
        press("ArrowDown")
        wait_for_state(page, "s.point.x % 8 === 6.5")  # a location: -1.5 + 8 * column
        before = get_state(page)["point"]
        press("ArrowLeft")
        press("Shift+ArrowUp")
        wait_for_state(page, f"s.point.x < {before['x']}")
        after = get_state(page)["point"]
        assert (before["x"] - after["x"], before["y"] - after["y"]) == (8, 40)
        wait_for(page, "document.getElementById('live').textContent.includes('Location')")
        assert "effective dilation" in page.inner_text("#live")
        for key, condition in (
            ("c", "s.cascade"),
            ("Enter", "s.pins.length === 1"),
            ("Delete", "s.pins.length === 0"),
            ("p", "s.pins.length === 1"),
            ("h", "s.heat === 'dilation'"),
            ("o", "s.overlay === 'prediction'"),
        ):
            press(key)
            wait_for_state(page, condition)
        assert page.is_visible("#legend")
        assert page.inner_text("#legend-middle") == "plain 16.0 px"
        assert page.is_checked("#cascade")
        press("?")
        assert page.is_visible("#help")
        press("Escape")
        assert not page.is_visible("#help")
        # Other controls keep their keys.
        page.focus('input[name="heat"]:checked')
        press("ArrowRight")
        wait_for_state(page, "s.heat === 'length'")
        assert get_state(page)["point"] == after
        page.locator("#class-list button").nth(2).click()
        wait_for_state(page, "s.shownClass === 2")


def test_the_url_holds_the_state(open_page: Open, simple_page: Path) -> None:
    given = "#layer=2&point=38.5,64.5&cascade=1&pins=6.5,8.5;94.5,40.5&heat=modulation&overlay=truth&class=1&opacity=45"  # noqa: E501
    with open_page(simple_page, given) as page:
        state = get_state(page)
        page.evaluate("history.replaceState(null, '', '#'); dispatchEvent(new Event('resize'))")
        wait_for(page, f"location.hash === '{given}'")  # written when the state rests
        page.evaluate("location.hash = '#layer=9&point=x&pins=1,;&heat=a&class=-1'")
        wait_for_state(page, "s.heat === 'none'")
        broken = get_state(page)
    assert state == {
        "layer": 1,
        "cascade": True,
        "point": {"x": 38.5, "y": 64.5},
        "pins": [{"x": 6.5, "y": 8.5}, {"x": 94.5, "y": 40.5}],
        "heat": "modulation",
        "overlay": "truth",
        "opacity": 45,
        "shownClass": 1,
    }
    reset = {"cascade": False, "pins": [], "heat": "none", "overlay": "none", "shownClass": None}
    assert broken == state | reset


def test_touch_on_a_phone(open_page: Open, simple_page: Path) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with open_page(simple_page, color_scheme="dark", **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        box = page.locator("#stage").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.touchscreen.tap(x, y)
        wait_for_state(page, "s.pins.length === 1")
        touch = page.context.new_cdp_session(page)
        for kind, shift in (("touchStart", 0), ("touchMove", 30), ("touchMove", 60)):
            points = [{"x": x + shift, "y": y + shift / 2}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        before = get_state(page)["pins"][0]
        wait_for_state(page, f"s.point.x > {before['x']} + 10")
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert len(get_state(page)["pins"]) == 1
        assert page.evaluate("scrollY") == 0


def test_dark_and_light(open_page: Open, simple_page: Path) -> None:
    color = "getComputedStyle(document.body).backgroundColor"
    with open_page(simple_page, color_scheme="dark", reduced_motion="reduce") as page:
        assert page.evaluate(color) == "rgb(21, 23, 28)"
        transition = "getComputedStyle(document.querySelector('button')).transitionDuration"
        assert page.evaluate(transition) == "0s"
        page.click("#theme")
        assert page.evaluate(color) == "rgb(251, 251, 252)"
        page.emulate_media(color_scheme="light")
        page.keyboard.press("t")
        assert page.evaluate(color) == "rgb(21, 23, 28)"


def test_offsets_that_are_not_finite(open_page: Open, tmp_path: Path) -> None:
    layers = make_layers(is_modulated=True)
    layers[0].offset[0, 3] = torch.nan
    layers[1].offset[0, 2] = torch.inf
    layers[2].offset[0, 4, 1, 5, 8] = torch.nan
    assert layers[2].mask is not None
    layers[2].mask[0, 1] = torch.nan
    assert [quantize_offset(layer)[0].dtype.name for layer in layers] == [
        *("int16", "float32", "int16")
    ]
    path = tmp_path / "page.html"
    write_explorer_page(path, make_content(layers, prediction=None, labels=None))
    with open_page(path, "#layer=3&point=62.5,40.5&cascade=1&heat=dilation") as page:
        points = page.evaluate("dcnsegExplorer.pointsAt(62.5, 40.5, {layer: 2, cascade: false})")
        assert [i for i, point in enumerate(points) if np.isnan(point[0])] == [4]
        assert [i for i, point in enumerate(points) if np.isnan(point[2])] == [1]
        assert " not finite" in page.inner_text("#not-finite")
        for key in ("h", "h", "h", "1", "c"):
            page.keyboard.press(key)
        wait_for_state(page, "s.heat === 'none' && s.layer === 0")
        assert page.inner_text('[data-number="length"] td >> nth=0') == "\N{EN DASH}"


def test_text_is_escaped(open_page: Open, tmp_path: Path) -> None:
    title = """</script><img src=x onerror="alert(1)">'&amp; <!--.jpg"""
    classes = ClassMap(tuple(ClassInfo(i, f"<b>'\"{i}</script>", (9, 9, 9)) for i in range(4)))
    path = tmp_path / "a 'b' #1.html"
    layer = replace(make_layer(0), name="<i>layer</i>")
    write_explorer_page(path, make_content([layer], title=title, class_map=classes))
    with open_page(path) as page:
        assert page.inner_text("h1") == title
        assert page.title() == f"{title}: offsets"
        assert page.inner_text("#layers code") == "<i>layer</i>"
        assert page.inner_text("#class-list button >> nth=3") == "<b>'\"3</script>"
        assert page.inner_text("#true-class b").startswith("<b>'\"")


def test_gallery(browser: Any, tmp_path: Path) -> None:
    image = make_image()
    entries = [
        GalleryEntry(f"<b>{name}", tmp_path / "out" / name, image)
        for name in ("sub/a b#1?.html", "%41.html")
    ]
    for entry in entries:
        content = make_content([make_layer(0)], title=entry.title, gallery="../index.html")
        write_explorer_page(entry.page, content)
    write_gallery(tmp_path / "out" / "index.html", entries, title="Offsets of <run>")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    for i in range(2):
        page.goto((tmp_path / "out" / "index.html").as_uri())
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        page.locator(".cards a").nth(i).click()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.inner_text("h1") == entries[i].title
    page.go_back()
    page.locator(".cards a").nth(0).click()
    page.click("nav a")
    page.wait_for_selector(".cards")
    context.close()


def test_a_large_image_makes_a_page_below_4_mb(tmp_path: Path) -> None:
    layers = make_layers(map_hw=(64, 64), is_modulated=True, stride_px=16.0)
    size_hw = (1024, 1024)
    labels = make_labels(size_hw)
    content = make_content(layers, image=make_image(size_hw), prediction=labels, labels=labels)
    write_explorer_page(tmp_path / "page.html", content)
    assert (tmp_path / "page.html").stat().st_size <= 4_000_000


@pytest.mark.parametrize("spread", [0.0, 1e-9, 0.5, 8.0, 1e5])
def test_offsets_are_embedded_with_a_small_error(spread: float) -> None:
    layers = make_layers(map_hw=(5, 6), stride_px=16.0, spread=spread)
    bound = compute_error_px(layers)
    assert bound <= MAX_ERROR_PX
    for layer in layers:
        steps, unit = quantize_offset(layer)
        assert (steps.dtype == np.int16) == (spread < 1000)
        assert unit == 2.0 ** round(np.log2(unit))
        error = (as_embedded(layer).offset - layer.offset).abs().max() * 16
        assert error <= MAX_ERROR_PX / CASCADE_DEPTH
        assert error <= bound


def test_only_the_last_layers_of_huge_maps_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = make_layers(is_modulated=True)
    size = 13 * 17 * 9 * (2 * 2 + 1)
    for limit, count in ((3 * size, 3), (3 * size - 1, 2), (1, 1)):
        monkeypatch.setattr(payload, "MAX_LAYER_BYTES", limit)
        assert select_layers(layers) == layers[-count:]
    write_explorer_page(tmp_path / "page.html", make_content(layers))
    assert "The first 2 deformable layers are omitted" in (tmp_path / "page.html").read_text()


def test_large_label_maps_are_scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MAX_LABELS_SIDE", 3)
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6) % 4
    values, _ = payload.make_payload([make_layer(0)], SCENE_CLASSES, labels, None)
    entry = values["prediction"]
    assert (entry["height"], entry["width"]) == (2, 3)
    assert (entry["labels"]["bytes"], entry["objects"]["bytes"]) == (6, 2 * 6)
    assert values["truth"] is None


def test_damaged_weights_and_wrong_labels(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image((64, 96))
    with pytest.raises(ShapeError, match=r"`labels` is uint8 \[4, 5\]; expected uint8 \[64, 96\]"):
        write_explorer(
            tmp_path / "a.html", predictor, image, labels=np.zeros((4, 5), np.uint8), title="a"
        )

    def fail(*_: object, **__: object) -> None:
        raise NotFiniteError("NaN")

    monkeypatch.setattr(predictor, "predict", fail)
    write_explorer(tmp_path / "a.html", predictor, image, title="a")
    assert '"prediction": null' in (tmp_path / "a.html").read_text()


def test_the_documented_snippet_runs(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(scenes / "test", tmp_path / "photos" / "test")
    shutil.copytree(run, tmp_path / "runs" / "photos")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(snippet, DOCS, "exec"), {})
    text = (tmp_path / "scene.html").read_text()
    assert "<h1>Scene</h1>" in text
    assert "On true object" in text


def test_a_plain_network_has_no_page(tmp_path: Path) -> None:
    config = ModelConfig(architecture="plain", encoder="resnet18", encoder_depth=3, deform_layers=0)
    model = build_segmenter(config, SCENE_CLASSES.num_classes).eval()
    plain = Predictor(model, SCENE_CLASSES, Preprocessing(), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="no deformable layer"):
        write_explorer(tmp_path / "a.html", plain, make_image(), title="a")
    assert not (tmp_path / "a.html").exists()


def test_modules_fit_into_one_scope() -> None:
    names: list[str] = []
    for i, module in enumerate(MODULES):
        source = (ASSETS / f"{module}.js").read_text()
        assert source.startswith("// @ts-check\n/** ")
        assert "</script" not in source
        assert max(map(len, source.splitlines())) <= 100
        names += re.findall(
            r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)", source, re.M
        )
        imported = re.findall(r'^import [^;]* from "\./(\w+)\.js";$', source, re.M)
        assert set(imported) <= set(MODULES[:i])
    assert len(names) == len(set(names)) > 80
    assert {path.stem for path in ASSETS.glob("*.js")} == set(MODULES)
    script = bundle_modules()
    assert not re.search(r"^(import|export) ", script, re.M)
    assert MASK_NOT_FINITE == 255
    assert f"const MASK_STEPS = {MASK_STEPS};" in script
    assert f"const NOT_FINITE = {NOT_FINITE};" in script
    assert f"const IGNORED_OBJECT = {IGNORED};" in script
    assert f"const OUTSIDE = {OUTSIDE};" in script
