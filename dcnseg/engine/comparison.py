"""Trains variants of a network under the same conditions and compares them.

Entry points: `compare` and `resume_comparison`. The folder of a comparison:

comparison.json   the settings, and which runs are finished
pairs.csv         the split, where the data folder has no val split of its own
runs/             a run folder for each variant and seed
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dcnseg import __version__
from dcnseg.checkpoint import RESUME_STATE
from dcnseg.config import (
    ModelConfig,
    TrainConfig,
    flatten_settings,
    from_dict,
    to_dict,
    unflatten_settings,
    with_absolute_paths,
)
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.engine.compared_runs import Comparison, TrainedRun, evaluate_runs
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.out_folder import check_out_is_separate, check_run_is_free
from dcnseg.engine.run_folder import is_table, read_run, split_stems
from dcnseg.engine.training import is_complete, resume, train
from dcnseg.engine.training_data import find_training_splits
from dcnseg.errors import CheckpointError, ConfigError, DataError, TrainingError, short_repr
from dcnseg.files import atomic_path, mark_output_folder, read_json
from dcnseg.models.segmenter import build_segmenter
from dcnseg.validation import require

STATE: Final = "comparison.json"
PAIRS: Final = "pairs.csv"
RUNS: Final = "runs"

ListenerFactory = Callable[[], AbstractContextManager[TrainingListener]]

_VARIANT: Final = re.compile(r"plain|dilation(?P<fixed>\d{1,9})|deformable(?P<v2>-v2)?")


def _no_listener() -> AbstractContextManager[TrainingListener]:
    return nullcontext(TrainingListener())


@dataclass
class _State:
    """The contents of comparison.json."""

    config: TrainConfig
    variants: list[str]
    seeds: list[int]
    trained: dict[str, list[str]]  # runs by variant, which were trained before
    sources: dict[str, str]
    command: str
    finished: list[str] = field(default_factory=list)  # names of run folders
    failed: dict[str, str] = field(default_factory=dict)  # why, by name of the run folder

    def tasks(self) -> list[tuple[str, int, str]]:
        """The variant, seed and folder of each run to train, seed by seed."""
        names = [name for name in self.variants if name not in self.trained]
        return [(name, seed, f"{name}-seed{seed}") for seed in self.seeds for name in names]

    def save(self, out: Path) -> None:
        content = {
            "dcnseg": __version__,
            "command": self.command,
            "settings": to_dict(self.config),
            "sources": self.sources,
            "variants": self.variants,
            "seeds": self.seeds,
            "trained": self.trained,
            "finished": self.finished,
            "failed": self.failed,
        }
        with atomic_path(out / STATE) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, out: Path) -> _State:
        path = out / STATE
        if not path.is_file():
            raise CheckpointError(
                f"{out} has no {STATE}; expected a folder that `dcnseg compare` wrote."
            )
        try:
            content = read_json(path, has_file_names=True)
            require(isinstance(content, dict), f"it is {short_repr(content)}.")
            config = from_dict(TrainConfig, content.get("settings"))
            variants, seeds, trained, sources, command, finished, failed = (
                content.get(name)
                for name in (
                    *("variants", "seeds", "trained", "sources"),
                    *("command", "finished", "failed"),
                )
            )
            require(_is_list(variants, str), f"variants is {short_repr(variants)}.")
            require(_is_list(seeds, int) and bool(seeds), f"seeds is {short_repr(seeds)}.")
            is_valid = is_table(trained, list) and all(_is_list(v, str) for v in trained.values())
            require(is_valid, f"trained is {short_repr(trained)}.")
            require(is_table(sources, str), f"sources is {short_repr(sources)}.")
            require(isinstance(command, str), f"command is {short_repr(command)}.")
            require(_is_list(finished, str), f"finished is {short_repr(finished)}.")
            require(is_table(failed, str), f"failed is {short_repr(failed)}.")
        except (OSError, ValueError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return cls(config, variants, seeds, trained, sources, command, finished, failed)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def variant_settings(name: str, config: TrainConfig) -> dict[str, Any]:
    """The settings of a variant: "plain", "dilationN", "deformable" or "deformable-v2".

    Raises:
        ConfigError: There is no such variant.
    """
    match = _VARIANT.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"--variants has {name!r}; expected plain, dilationN (a fixed dilation of N, such as "
            "dilation4), deformable or deformable-v2."
        )
    if name.startswith("deformable"):
        layers = config.model.deform_layers or ModelConfig.deform_layers
        is_v2 = match["v2"] is not None
        return {"model.deform_layers": layers, "model.modulated": is_v2}
    return {"model.deform_layers": 0, "model.late_dilation": int(match["fixed"] or 0)}


def default_variants(config: TrainConfig) -> list[str]:
    """The variants to compare: plain, with twice its dilation, deformable and deformable v2."""
    dilation = 2**config.model.encoder_depth // config.model.output_stride
    return ["plain", f"dilation{2 * dilation}", "deformable", "deformable-v2"]


def compare(
    config: TrainConfig,
    out: Path,
    *,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    trained: Mapping[str, Sequence[Path]] | None = None,
    overwrite: bool = False,
    sources: Mapping[str, str] | None = None,
    command: str = "",
    make_listener: ListenerFactory = _no_listener,
    on_run: Callable[[str], None] | None = None,
) -> Comparison:
    """Train every variant with every seed, and compare them on the test images (else val).

    All runs have the same data, split, schedule and order of the images. An interrupted comparison
    is resumed with `resume_comparison`. A run that fails is reported and does not stop the others.

    Args:
        config: The settings of all runs, without those of the variants.
        out: The folder of the comparison; must be new or empty unless `overwrite` is set.
        variants: Names, see `variant_settings`; None: `default_variants`, or only the trained ones.
        seeds: A run is trained with each of them.
        trained: Run folders by variant, which are compared instead of training the variant.
        overwrite: Whether to replace a previous comparison in the folder.
        sources: The source of each setting, for config.json.
        command: The command that started the comparison, for its report.
        make_listener: Called before each run; the listener of the context receives its progress.
        on_run: Called with a line of text before each run, and if one fails.

    Raises:
        ConfigError: A variant or setting is wrong, or there are fewer than two variants.
        DataError: See `train`.
        TrainingError: Fewer than two variants have a run that did not fail.
        TrainingStoppedError: The listener requested a stop; the comparison can be resumed.
    """
    given = {name: [str(run.resolve()) for run in runs] for name, runs in (trained or {}).items()}
    if variants is None:
        variants = [] if given else default_variants(config)
    names = list(dict.fromkeys([*variants, *given]))
    if len(names) < 2:
        raise ConfigError(f"--variants is {', '.join(names)}; expected at least two.")
    if not seeds:
        raise ConfigError("`seeds` is empty; expected at least one seed.")
    check_out_is_separate(out, config.data.root)
    for name in names:
        if name not in given:  # fail early: its turn may come hours later
            settings = flatten_settings(config) | variant_settings(name, config)
            build_segmenter(unflatten_settings(settings).model, num_classes=2)
    splits = find_training_splits(config)
    check_out_is_separate(out, config.data.root, splits)
    check_run_is_free(out, overwrite=overwrite)
    folders = [Path(run) for runs in given.values() for run in runs]
    is_trained_here = any(name not in given for name in names)
    _check_same_split(folders, split_stems(splits) if is_trained_here else None)
    for old in (out / RUNS).glob(f"*/{RESUME_STATE}"):
        old.unlink()
    mark_output_folder(out)
    config = with_absolute_paths(config)
    if splits.is_val_drawn and is_trained_here:  # it depends on the seed of a run
        source = _write_pairs(out / PAIRS, splits)
        config = replace(config, data=replace(config.data, images="", masks="", pairs=source))
    state = _State(config, names, list(seeds), given, dict(sources or {}), command)
    state.save(out)
    return _run(state, out, make_listener, on_run)


def resume_comparison(
    out: Path,
    *,
    make_listener: ListenerFactory = _no_listener,
    on_run: Callable[[str], None] | None = None,
) -> Comparison:
    """Resume an interrupted comparison; the result is that of an uninterrupted one.

    Runs that failed are tried again.

    Raises:
        CheckpointError: The folder has no comparison, or its files are damaged.
    """
    return _run(_State.load(out), out, make_listener, on_run)


def _run(
    state: _State,
    out: Path,
    make_listener: ListenerFactory,
    on_run: Callable[[str], None] | None,
) -> Comparison:
    report = on_run or (lambda _: None)
    tasks = state.tasks()
    for number, (name, seed, folder) in enumerate(tasks, 1):
        if folder in state.finished:
            continue
        report(f"Run {number} of {len(tasks)}: {name}, seed {seed}")
        state.failed.pop(folder, None)
        try:
            with make_listener() as listener:
                _train_one(state, name, seed, out / RUNS / folder, listener)
            state.finished.append(folder)
        except TrainingError as error:
            state.failed[folder] = str(error)
            report(f"Error: {error}")
        state.save(out)
    runs = [
        TrainedRun(name, out / RUNS / folder, seed)
        for name, seed, folder in tasks
        if folder in state.finished
    ]
    runs += [
        TrainedRun(name, Path(run), None) for name, given in state.trained.items() for run in given
    ]
    if len({run.variant for run in runs}) < 2:
        raise TrainingError(f"{out}: fewer than two variants have a run that did not fail.")
    runs.sort(key=lambda run: state.variants.index(run.variant))
    return evaluate_runs(
        state.config, runs, command=state.command, failed=state.failed, on_run=report
    )


def _train_one(state: _State, name: str, seed: int, run: Path, listener: TrainingListener) -> None:
    if (run / RESUME_STATE).is_file():
        if not is_complete(run):
            resume(run, listener=listener)
        return
    changes = variant_settings(name, state.config) | {"seed": seed}
    config = unflatten_settings(flatten_settings(state.config) | changes)
    sources = state.sources | dict.fromkeys(changes, f"variant {name}")
    train(config, run, sources=sources, overwrite=True, listener=listener)


def _write_pairs(path: Path, splits: Splits) -> Path:
    """Write the split as a list of pairs, so that every seed has the same."""
    rows = [
        (str(sample.image.absolute()), str(sample.mask.absolute()), split)
        for split in SPLIT_NAMES
        for sample in getattr(splits, split)
    ]
    try:
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("image", "mask", "split"), *rows])
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: {short_repr(error.object)} has a name that is not UTF-8 text. Rename it, or "
            "put the validation images into a folder val."
        ) from error
    return path.absolute()


def _check_same_split(
    runs: Sequence[Path], expected: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Raise a ConfigError if runs have other classes or splits than expected, or than the first."""
    classes = None
    for run in runs:
        record = read_run(run)
        classes = classes or record.class_map
        if record.class_map != classes:
            raise ConfigError(f"{run} has other classes than {runs[0]}; they cannot be compared.")
        expected = record.split if expected is None else expected
        for name, stems in record.split.items():
            if set(stems) != set(expected[name]):
                raise ConfigError(
                    f"{run} has other {name} images than the other runs, so that their scores "
                    "cannot be compared. Train them on the same data with the same split."
                )
