"""Evaluation of a predictor on a split; entry points `evaluate`, `evaluate_run`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dcnseg.checkpoint import BEST_WEIGHTS, find_weights, read_weights_info
from dcnseg.config import PairSource, PredictConfig
from dcnseg.data.class_map import ClassMap, find_class_list
from dcnseg.data.dataset import load_pair
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.data.sample import Sample
from dcnseg.engine.distributed import SINGLE, World, join_world
from dcnseg.engine.region_evaluation import collect_regions
from dcnseg.engine.run_folder import is_run, read_run
from dcnseg.errors import ConfigError, DataError, NotFiniteError
from dcnseg.inference.inputs import InputImage, find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.scoring.boundary import count_boundaries
from dcnseg.scoring.counts import LabelIndices, count_classes, count_confusion, mean_iou
from dcnseg.scoring.objects import score_objects
from dcnseg.scoring.region_scores import ImageRegions, score_regions
from dcnseg.scoring.scores import ImageScores, Scores
from dcnseg.validation import did_you_mean

SPLITS = ("train", "val", "test", "all")
_NOTHING: Final[Any] = object()

Item = TypeVar("Item")


def evaluate(
    predictor: Predictor,
    samples: Sequence[Sample],
    *,
    has_details: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    world: World = SINGLE,
) -> Scores:
    """Predict every image at its original resolution and compute the scores.

    Args:
        predictor: The predictor.
        samples: The images and masks.
        has_details: Whether to compute boundary IoU and the scores of objects, too.
        on_progress: Called with the number of evaluated images and the total.
        world: The processes that share the images; all of them get the scores.

    Raises:
        DataError: an image or mask cannot be read, or their sizes differ; the message names it.
        ConfigError: the predictor has a minimum confidence.
        NotFiniteError: the network's output for an image is not finite; the message names it.
    """
    if predictor.config.min_confidence:
        raise ConfigError(
            f"`min_confidence` is {predictor.config.min_confidence}; scores need a prediction for "
            "every pixel. Evaluate with 0."
        )
    part = _evaluate_part(predictor, samples, world, has_details, on_progress)
    parts = world.gather(part)
    if failed := [each.failure for each in parts if each.failure]:
        raise NotFiniteError(min(failed)[1])
    names = predictor.class_map.names
    regions = _interleave([each.regions for each in parts])
    return Scores(
        np.sum([each.confusion for each in parts], axis=0),
        names,
        tuple(_interleave([each.images for each in parts])),
        regions=score_regions(regions, len(names)) if predictor.has_region_head else None,
        unfiltered_mean_iou=(
            float(mean_iou(count_classes(np.sum([p.unfiltered for p in parts], axis=0))))
            if predictor.config.min_region_score
            else None
        ),
    )


@dataclass
class _Part:
    """The images that a process evaluates; `failure` is the first one's index and message."""

    confusion: npt.NDArray[np.int64]
    unfiltered: npt.NDArray[np.int64]
    images: list[ImageScores] = field(default_factory=list)
    regions: list[ImageRegions] = field(default_factory=list)
    failure: tuple[int, str] | None = None


def _evaluate_part(
    predictor: Predictor,
    samples: Sequence[Sample],
    world: World,
    has_details: bool,
    on_progress: Callable[[int, int], None] | None,
) -> _Part:
    """Evaluate the images of this process; ends early if the output for one is not finite."""
    class_map = predictor.class_map
    shape = (class_map.num_classes,) * 2
    part = _Part(np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    own = world.part_of(samples)
    with ThreadPoolExecutor(max_workers=2) as pool:
        pairs = read_ahead(pool, own, lambda sample: load_pair(sample, class_map))
        # As many rounds in all processes, because `on_progress` may exchange something.
        for first in range(0, len(samples), world.size):
            if part.failure is None and (pair := next(pairs, None)) is not None:
                sample, loaded = pair
                try:
                    _evaluate_image(predictor, sample, loaded.result(), has_details, part)
                except NotFiniteError as error:
                    part.failure = first + world.rank, f"{sample.image}: {error}"
                    if world.size == 1:
                        break
            if on_progress:
                on_progress(min(first + world.size, len(samples)), len(samples))
    return part


def _evaluate_image(
    predictor: Predictor,
    sample: Sample,
    pair: tuple[LabelIndices, LabelIndices],
    has_details: bool,
    part: _Part,
) -> None:
    (image, labels), class_map = pair, predictor.class_map
    min_score, num_classes = predictor.config.min_region_score, class_map.num_classes
    unfiltered = predictor.with_config(min_region_score=0.0)
    prediction = unfiltered.predict(image, regions=predictor.has_region_head)
    predicted = prediction.without_low_regions(min_score).labels
    if predictor.has_region_head:
        part.regions.append(collect_regions(labels, prediction, predictor.region_min_area))
    if min_score:
        part.unfiltered += count_confusion(labels, prediction.labels, num_classes)
    of_image = count_confusion(labels, predicted, num_classes)
    part.confusion += of_image
    scores = ImageScores(sample.stem, count_classes(of_image))
    part.images.append(
        _with_details(scores, labels, predicted, class_map) if has_details else scores
    )


def _interleave(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Join the results of the processes in the order of the images."""
    rounds = zip_longest(*parts, fillvalue=_NOTHING)
    return [item for each in rounds for item in each if item is not _NOTHING]


def _with_details(
    scores: ImageScores, labels: LabelIndices, predicted: LabelIndices, class_map: ClassMap
) -> ImageScores:
    return replace(
        scores,
        boundary=count_boundaries(labels, predicted, class_map.num_classes),
        objects=tuple(score_objects(labels, predicted, class_map.object_indices)),
    )


def evaluate_run(
    run: Path,
    root: Path,
    split: str,
    *,
    device: str = "auto",
    amp: str = "off",
    config: PredictConfig | None = None,
    source: PairSource | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Evaluate a run folder, weights file or ONNX model on a split of a data folder.

    The arguments are those of `dcnseg.evaluate`, `evaluate` and `find_evaluated_samples`.

    Raises:
        ConfigError: there is no such split, or `run` and `root` are swapped.
        DataError: the data has other classes than the run, or a file is missing or invalid.
        NotFiniteError: see `evaluate`.
    """
    with join_world() as world:
        world.claim_device(device)
        samples = find_evaluated_samples(run, root, split, source)
        predictor = Predictor.load(run, device=device, amp=amp, config=config)
        check_classes(root, predictor.class_map)
        return evaluate(predictor, samples, on_progress=on_progress, world=world)


def find_evaluated_samples(
    run: Path, root: Path, split: str, source: PairSource | None = None
) -> tuple[Sample, ...]:
    """Find the images of a split of a data folder.

    On the data that the run was trained on, the run's own split is used, even if images have been
    added since. Other data without a val folder is split with the default seed.

    Args:
        run: Run folder or weights file.
        root: Data folder.
        split: "train", "val", "test" or "all".
        source: Where the images and masks are. Without it, the run's own source is used on its own
            data.

    Raises:
        ConfigError: there is no such split, or `run` and `root` are swapped.
        DataError: a file of the run's split is missing.
    """
    _check_order(run, root)
    if split not in SPLITS:
        hint = did_you_mean(split, SPLITS)
        raise ConfigError(f"--split is {split!r}; expected one of {', '.join(SPLITS)}.{hint}")
    splits = splits_of_run(run if run.is_dir() else run.parent, root, source or PairSource())
    samples = splits.all_samples() if split == "all" else getattr(splits, split)
    if not samples:
        there = ", ".join(name for name in SPLITS[:3] if getattr(splits, name))
        raise ConfigError(
            f"--split is {split}, but {root} does not contain this split; it contains {there}."
        )
    return tuple(samples)


def find_measured_images(
    run: Path, root: Path, split: str, *, out: Path
) -> tuple[Sample, ...] | list[InputImage]:
    """Find the images of a split as `find_evaluated_samples` does; without masks, all images.

    Args:
        run: Run folder or weights file.
        root: Data folder, or a folder of images without masks.
        split: "train", "val", "test" or "all".
        out: A folder whose files are no input.

    Raises:
        ConfigError: see `find_evaluated_samples`.
        DataError: there are no images, or only some of them have masks.
    """
    try:
        return find_evaluated_samples(run, root, split)
    except DataError:
        if not _has_only_images(root):
            raise
    return find_inputs([str(root)], outputs=[out])


def find_masks(
    run: Path, images: Sequence[InputImage], folders: Sequence[str]
) -> dict[str, Sample]:
    """Find the masks of images in data folders: that of the run, and the given ones.

    Args:
        run: Run folder or weights file.
        images: The images.
        folders: Paths, of which some may be data folders with the classes of the run.

    Returns:
        Image and mask by the resolved path of the image, for the images with a mask.

    Raises:
        CheckpointError: The run has no weights, or they cannot be read.
    """
    class_map = read_weights_info(find_weights(run)).class_map
    folder = run if run.is_dir() else run.parent
    roots = [(Path(name), PairSource()) for name in folders if os.path.isdir(name)]  # noqa: PTH112
    if is_run(folder):
        data = read_run(folder).config.data
        roots.append((data.root, data.source))
    paths = {os.path.realpath(image.path) for image in images}
    found: dict[str, Sample] = {}
    for root, source in roots:
        if not any(Path(path).is_relative_to(os.path.realpath(root)) for path in paths):
            continue
        try:
            samples = find_pairs(root, source).splits.all_samples()
            check_classes(root, class_map)
        except DataError:  # it is not a data folder, or has other classes
            continue
        for sample in samples:
            path = os.path.realpath(sample.image)
            if path in paths:
                found.setdefault(path, sample)
    return found


def find_own_images(run: Path, count: int) -> list[Path]:
    """Find the first validation images of a run; none if its data is not there any more."""
    folder = run if run.is_dir() else run.parent
    if not is_run(folder):
        return []
    root = read_run(folder).config.data.root
    if not root.is_dir():
        return []
    try:
        samples = find_evaluated_samples(run, root, "val")
    except DataError:  # the data has changed since
        return []
    return [sample.image for sample in samples[:count]]


def _has_only_images(root: Path) -> bool:
    """Whether a folder has images and not a single mask."""
    try:
        pairing = find_pairs(root)
    except DataError:
        return False
    has_masks = pairing.splits.all_samples() or pairing.masks_without_image
    return bool(pairing.images_without_mask) and not has_masks


def _check_order(run: Path, root: Path) -> None:
    if root.is_file() or (root / BEST_WEIGHTS).is_file():
        if run.is_dir() and not (run / BEST_WEIGHTS).is_file():
            raise ConfigError(
                f"{run} is not a run, but {root} is. The run must be the first argument. Try: "
                f"dcnseg evaluate {root} {run}"
            )
    elif not root.exists():
        raise DataError(f"{root}: does not exist.")


def splits_of_run(run: Path, root: Path, source: PairSource) -> Splits:
    """Find the splits of a data folder; the recorded splits if the run was trained on it."""
    record = read_run(run) if is_run(run) else None
    if source.pairs:
        source = replace(source, pairs=source.pairs.resolve())  # as in config.json
    is_own_data = record is not None and record.config.data.root.resolve() == root.resolve()
    own_source = record.config.data.source if record is not None and is_own_data else None
    is_own = own_source is not None and source in (PairSource(), own_source)
    source = own_source if own_source and is_own else source
    splits = find_splits(root, source)
    if record is None:
        return splits
    if not is_own and not splits.is_val_drawn:
        return splits  # the folder has its own val split
    by_stem = {sample.stem: sample for sample in splits.all_samples()}
    chosen: dict[str, tuple[Sample, ...]] = {}
    for name, stems in record.split.items():
        # The split's own samples first: a stem may occur in several splits.
        own = by_stem | {sample.stem: sample for sample in getattr(splits, name)}
        missing = [stem for stem in stems if stem not in own]
        if missing and not is_own:
            return splits  # not the run's images
        if missing:
            raise DataError(
                f"{root}: {len(missing)} {name} images of the run are missing, such as "
                f"{missing[0]}."
            )
        chosen[name] = tuple(own[stem] for stem in stems)
    train, val, test = (chosen[name] for name in SPLIT_NAMES)
    return Splits(train, val, test, splits.layout)


def check_classes(root: Path, trained: ClassMap) -> None:
    """Raise a DataError if the data's class list has another class for an id than the run."""
    class_list = find_class_list(root)
    if class_list is None:
        return
    names = dict(zip(trained.ids, trained.names, strict=True))
    for entry in ClassMap.from_file(class_list).classes:
        name = names.get(entry.id)
        if entry.id not in trained.ignored_ids and name != entry.name:
            expected = f"the run has {name!r}" if name else "the run has no class with this id"
            raise DataError(
                f"{class_list}: class {entry.id} is {entry.name!r}, but {expected}. Evaluate on "
                "data with the classes of the run."
            )
