"""Scores from the confusion matrix of a split; entry points `evaluate`, `evaluate_run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnseg.checkpoint import BEST_WEIGHTS
from dcnseg.config import PairSource, PredictConfig
from dcnseg.data.class_map import IGNORE_INDEX, ClassMap, find_class_list
from dcnseg.data.dataset import load_pair
from dcnseg.data.pairing.folders import find_splits
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.data.sample import Sample
from dcnseg.engine.run_folder import is_run, read_run
from dcnseg.errors import ConfigError, DataError, NotFiniteError
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.validation import did_you_mean

SPLITS = ("train", "val", "test", "all")


@dataclass(frozen=True)
class Scores:
    """Scores of a split."""

    confusion: npt.NDArray[np.int64]  # pixels by true (row) and predicted class (column), [K, K]
    names: tuple[str, ...]  # of the K classes

    @property
    def class_iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union per class, [K]; NaN for a class neither true nor predicted."""
        hits = np.diag(self.confusion).astype(np.float64)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        with np.errstate(invalid="ignore"):
            return np.asarray(hits / union)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes; classes neither true nor predicted are ignored."""
        known = self.class_iou[~np.isnan(self.class_iou)]
        return float(known.mean()) if known.size else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the labeled pixels that are predicted correctly."""
        total = self.confusion.sum()
        return float(np.trace(self.confusion) / total) if total else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values; undefined scores are None."""

        def number(value: float) -> float | None:
            return None if np.isnan(value) else round(float(value), 6)

        return {
            "mean_iou": number(self.mean_iou),
            "pixel_accuracy": number(self.pixel_accuracy),
            "class_iou": {
                name: number(iou) for name, iou in zip(self.names, self.class_iou, strict=True)
            },
            "labelled_pixels": int(self.confusion.sum()),
        }


def count_confusion(
    labels: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], num_classes: int
) -> npt.NDArray[np.int64]:
    """Count pixels by true and predicted class, [K, K]; ignored pixels are not counted."""
    is_labeled = labels != IGNORE_INDEX
    pairs = labels[is_labeled].astype(np.int64) * num_classes + predicted[is_labeled]
    counts = np.bincount(pairs, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def evaluate(
    predictor: Predictor,
    samples: Sequence[Sample],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Predict every image at its original resolution and compute the scores.

    `on_progress` is called with the number of evaluated images and the total.

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
    class_map = predictor.class_map
    confusion = np.zeros((class_map.num_classes,) * 2, np.int64)
    with ThreadPoolExecutor(max_workers=2) as pool:
        pairs = read_ahead(pool, samples, lambda sample: load_pair(sample, class_map))
        for done, (sample, pair) in enumerate(pairs, 1):
            image, labels = pair.result()
            try:
                predicted = predictor.predict(image).labels
            except NotFiniteError as error:
                raise NotFiniteError(f"{sample.image}: {error}") from error
            confusion += count_confusion(labels, predicted, class_map.num_classes)
            if on_progress:
                on_progress(done, len(samples))
    return Scores(confusion, class_map.names)


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
    """Evaluate a run folder or weights file on a split of a data folder.

    On the data that the run was trained on, the run's own split is used, even if images have been
    added since, and without a `source` the run's own one. Other data without a val folder is split
    with the default seed. The arguments are those of `dcnseg.evaluate` and `evaluate`.

    Raises:
        ConfigError: there is no such split, or `run` and `root` are swapped.
        DataError: the data has other classes than the run, or a file is missing or invalid.
        NotFiniteError: see `evaluate`.
    """
    _check_order(run, root)
    if split not in SPLITS:
        hint = did_you_mean(split, SPLITS)
        raise ConfigError(f"--split is {split!r}; expected one of {', '.join(SPLITS)}.{hint}")
    predictor = Predictor.from_checkpoint(run, device=device, amp=amp, config=config)
    splits = _splits_of(run if run.is_dir() else run.parent, root, source or PairSource())
    samples = splits.all_samples() if split == "all" else getattr(splits, split)
    if not samples:
        there = ", ".join(name for name in SPLITS[:3] if getattr(splits, name))
        raise ConfigError(
            f"--split is {split}, but {root} does not contain this split; it contains {there}."
        )
    _check_classes(root, predictor.class_map)
    return evaluate(predictor, samples, on_progress=on_progress)


def _check_order(run: Path, root: Path) -> None:
    if root.is_file() or (root / BEST_WEIGHTS).is_file():
        if run.is_dir() and not (run / BEST_WEIGHTS).is_file():
            raise ConfigError(
                f"{run} is not a run, but {root} is. The run must be the first argument. Try: "
                f"dcnseg evaluate {root} {run}"
            )
    elif not root.exists():
        raise DataError(f"{root}: does not exist.")


def _splits_of(run: Path, root: Path, source: PairSource) -> Splits:
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


def _check_classes(root: Path, trained: ClassMap) -> None:
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
