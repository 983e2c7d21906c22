"""The classes of a data set: names, ids in the mask files, colors, and ignored entries.

`ClassMap` is the entry point. Only this module converts between *ids*, the values in mask files
(0..65535), and *training indices* 0..K-1, which the network uses and in which 255 marks an ignored
pixel.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_info import ClassInfo, check_entry, entry_dict, parse_entry, with_colors
from dcnseg.data.label_codes import (
    IGNORE_INDEX,
    MAX_ID,
    Color,
    UInt8Array,
    encode_by_color,
    encode_by_id,
    unpack_color,
)
from dcnseg.errors import ConfigError, DataError, ShapeError, short_repr
from dcnseg.files import explain_unreadable, read_json, read_text

__all__ = ["IGNORE_INDEX", "ClassInfo", "ClassMap", "UnknownLabelsError"]

MAX_CLASSES: Final = 255
_BLURRED: Final = 32  # more unknown values than this are not missing classes
_BACKGROUND: Final = ("background", "_background_", "bg")
_IGNORED_COLOR: Final = (224, 224, 192)  # PASCAL VOC's color of void


class UnknownLabelsError(DataError):
    """A mask has values or colors of no class and no ignored entry.

    Attributes:
        what: The message without the advice.
        counts: Pixels per unknown id or color, the most frequent first.
    """

    def __init__(self, what: str, counts: Mapping[int, int] | Mapping[Color, int]) -> None:
        super().__init__(f"{what} {labels_advice(counts)}")
        self.what = what
        self.counts = dict(counts)


@dataclass(frozen=True)
class ClassMap:
    """The classes in the order of their training indices, and the entries that are ignored.

    The id 255 is ignored unless a class has it. With a `threshold` above 0, masks hold gray values
    instead of ids: values of at least `threshold` are the class with the greater id, others the one
    with the smaller id. `source` names the origin in messages and is ignored in comparisons.

    Raises:
        ConfigError: There is no class or more than 255; an id, name or color is out of range or
            repeated; or there is a threshold and the number of classes is not two.
    """

    classes: tuple[ClassInfo, ...]
    ignored: tuple[ClassInfo, ...] = ()
    source: str = field(default="the class list", compare=False)
    threshold: int = 0

    def __post_init__(self) -> None:
        check_num_entries(len(self.classes), len(self.ignored), self.source)
        self._check_threshold()
        entries = self.classes + self.ignored
        for entry in entries:
            check_entry(entry, self.source)
        for what, values in (("id", [e.id for e in entries]), ("name", [e.name for e in entries])):
            value, count = Counter[Any](values).most_common(1)[0]
            if count > 1:
                raise ConfigError(
                    f"{self.source} has the {what} {short_repr(value)} {count} times; each {what} "
                    "must be unique among classes and ignored entries."
                )

    def _check_threshold(self) -> None:
        if not 0 <= self.threshold <= MAX_ID:
            raise ConfigError(
                f"{self.source}: the threshold is {short_repr(self.threshold)}; expected 0 (off) "
                f"to {MAX_ID}."
            )
        if self.threshold and len(self.classes) != 2:
            raise ConfigError(
                f"{self.source} has {len(self.classes)} classes; a threshold (--mask-threshold) "
                "requires two."
            )

    @classmethod
    def from_file(cls, path: Path) -> ClassMap:
        """Read `classes.json` (the form of `to_dict`) or `classes.txt` (a name per line).

        Raises:
            DataError: The file cannot be read or is invalid.
        """
        is_json = path.suffix.lower() == ".json"
        with explain_unreadable(path, "a readable class list"):
            content = read_json(path) if is_json else read_text(path)
        try:
            if is_json:
                return cls.from_dict(content, source=path.name)
            names = [line.strip() for line in content.splitlines() if line.strip()]
            check_num_entries(len(names), 0, path.name)
            entries = [(i, name, None) for i, name in enumerate(names)]
            return cls(with_colors(entries), (), path.name)
        except ConfigError as error:  # its text begins with the file name
            raise DataError(f"{path}{str(error).removeprefix(path.name)}") from error

    @classmethod
    def from_values(cls, values: Iterable[int], *, source: str = "the mask values") -> ClassMap:
        """Create a class `class_<id>` for every value except 255.

        If the only values are 0 and 255, or 0 and 65535, they are `background` and `foreground`.
        """
        found = {int(value) for value in values}
        if found in ({0, IGNORE_INDEX}, {0, MAX_ID}):
            return cls.binary(max(found), source=source)
        ids = sorted(found - {IGNORE_INDEX})
        return cls(with_colors([(i, f"class_{i}", None) for i in ids]), (), source)

    @classmethod
    def binary(cls, foreground: int, *, source: str = "the mask values") -> ClassMap:
        """Create the classes `background` with the id 0 and `foreground` with the given id."""
        entries = [(0, "background", None), (foreground, "foreground", None)]
        return cls(with_colors(entries), (), source)

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "the class list") -> ClassMap:
        """Read `{"classes": [{"id", "name", "color"}, ...], "ignore": [...], "threshold": N}`.

        `color`, `ignore` and `threshold` are optional.

        Raises:
            ConfigError: The content has another form, or a value is out of range or repeated.
        """
        if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
            raise ConfigError(
                f'{source}: expected {{"classes": [{{"id": 0, "name": "..."}}, ...]}}.'
            )
        groups = [content["classes"], content.get("ignore") or []]
        if not isinstance(groups[1], list):
            raise ConfigError(
                f'{source}: "ignore" must be a list of entries like those of classes.'
            )
        check_num_entries(len(groups[0]), len(groups[1]), source)
        parsed = [[parse_entry(entry, source) for entry in group] for group in groups]
        entries = with_colors(parsed[0] + parsed[1])
        threshold = content.get("threshold", 0)
        if type(threshold) is not int:
            raise ConfigError(
                f'{source}: "threshold" is {short_repr(threshold)}; expected an integer.'
            )
        return cls(entries[: len(parsed[0])], entries[len(parsed[0]) :], source, threshold)

    def to_dict(self) -> dict[str, Any]:
        """Return the form that `from_dict` reads, without generated colors."""
        content: dict[str, Any] = {
            "classes": [entry_dict(entry) for entry in self.classes],
            "ignore": [entry_dict(entry) for entry in self.ignored],
        }
        return content | ({"threshold": self.threshold} if self.threshold else {})

    @property
    def num_classes(self) -> int:
        """K, the number of classes without ignored entries."""
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the order of the training indices."""
        return tuple(entry.name for entry in self.classes)

    @property
    def object_indices(self) -> tuple[int, ...]:
        """The training indices of all classes but the background, which is known by its name."""
        return tuple(i for i, name in enumerate(self.names) if name.lower() not in _BACKGROUND)

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids in the order of the training indices."""
        return tuple(entry.id for entry in self.classes)

    @property
    def ids_by_name(self) -> dict[str, int]:
        """The id of every class and ignored entry, by its name."""
        return {entry.name: entry.id for entry in self.classes + self.ignored}

    @cached_property
    def ignored_ids(self) -> tuple[int, ...]:
        """Every id that is ignored, 255 included unless a class has it."""
        ids = {entry.id for entry in self.ignored} | ({IGNORE_INDEX} - set(self.ids))
        return tuple(sorted(ids))

    @property
    def has_colors(self) -> bool:
        """Whether the list gives every class a color (none is generated)."""
        return all(entry.is_color_given for entry in self.classes)

    def with_ignored(self, values: Iterable[int]) -> ClassMap:
        """Return a map that also ignores these ids; classes with such ids become ignored entries.

        Raises:
            ConfigError: No class remains.
        """
        wanted = {int(value) for value in values}
        moved = tuple(entry for entry in self.classes if entry.id in wanted)
        known = {entry.id for entry in self.classes + self.ignored} | {IGNORE_INDEX}
        new = tuple(
            ClassInfo(value, f"ignored_{value}", _IGNORED_COLOR, is_color_given=False)
            for value in sorted(wanted - known)
        )
        kept = tuple(entry for entry in self.classes if entry.id not in wanted)
        if self.classes and not kept:
            raise ConfigError(
                f"--ignore-index {','.join(map(str, sorted(wanted)))} ignores all "
                f"{len(self.classes)} classes of {self.source}; at least one must remain."
            )
        return replace(self, classes=kept, ignored=self.ignored + moved + new)

    def with_threshold(self, threshold: int) -> ClassMap:
        """Return a map with this `threshold` for gray values; 0 changes nothing.

        Raises:
            ConfigError: The number of classes is not two.
        """
        return replace(self, threshold=threshold) if threshold else self

    def encode_ids(self, id_map: npt.NDArray[np.integer[Any]]) -> UInt8Array:
        """Turn ids [H, W] into training indices uint8 [H, W], 255 where ignored.

        Raises:
            UnknownLabelsError: A value belongs to no entry; gives the values and pixel counts.
        """
        if self.threshold:
            return self._encode_by_threshold(id_map)
        indices, unknown = encode_by_id(id_map, self.ids, self.ignored_ids)
        if unknown:
            raise self.unknown_labels(unknown)
        return indices

    def encode_colors(self, color_mask: UInt8Array) -> UInt8Array:
        """Turn colors uint8 [H, W, 3] (RGB) into training indices, by exact match.

        Raises:
            ConfigError: The class list has no colors, or two entries share one.
            UnknownLabelsError: A color belongs to no entry; gives the colors and pixel counts.
        """
        colors, ignored_colors = self._checked_colors
        indices, unknown = encode_by_color(color_mask, colors, ignored_colors)
        if unknown:
            raise self.unknown_labels(
                {unpack_color(packed): count for packed, count in unknown.items()}
            )
        return indices

    def decode_indices(self, indices: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """Turn training indices [H, W] into ids, uint8 or, when a class id exceeds 255, uint16.

        Raises:
            ShapeError: An index is neither 0..K-1 nor 255.
        """
        table = np.full(256, -1, np.int32)
        table[: self.num_classes] = self.ids
        if self.ignored_ids:
            is_default = IGNORE_INDEX in self.ignored_ids
            table[IGNORE_INDEX] = IGNORE_INDEX if is_default else self.ignored_ids[0]
        is_valid = (indices >= 0) & (indices < 256)
        ids = table[np.where(is_valid, indices, 0)]
        if not is_valid.all() or (ids < 0).any():
            wrong = int(indices[~is_valid | (ids < 0)].flat[0])
            raise ShapeError(
                f"`indices` holds {wrong}; the {self.num_classes} classes have the indices "
                f"0..{self.num_classes - 1}, and {IGNORE_INDEX} marks ignored pixels."
            )
        return ids.astype(np.uint8 if table.max() <= 255 else np.uint16)

    def palette(self) -> UInt8Array:
        """Return the colors by id, uint8 [256, 3], without ids above 255."""
        table = np.zeros((256, 3), np.uint8)
        if IGNORE_INDEX not in self.ids:
            table[IGNORE_INDEX] = _IGNORED_COLOR
        for entry in self.ignored + self.classes:
            if entry.id < 256:
                table[entry.id] = entry.color
        return table

    def index_colors(self) -> UInt8Array:
        """Return the colors by training index, uint8 [K, 3]."""
        return np.array([entry.color for entry in self.classes], np.uint8)

    @cached_property
    def _checked_colors(self) -> tuple[tuple[Color, ...], tuple[Color, ...]]:
        """The given colors of the classes and of the ignored entries, without duplicates."""
        if not self.has_colors:
            raise ConfigError(
                f"there are no class colors in {self.source}, so color masks cannot be decoded."
            )
        ignored = [entry for entry in self.ignored if entry.is_color_given]
        owners: dict[Color, ClassInfo] = {}
        for entry in (*self.classes, *ignored):
            other = owners.setdefault(entry.color, entry)
            if other is not entry and other in self.classes:  # ignored entries may share a color
                raise ConfigError(
                    f"{self.source}: {other.name!r} and {entry.name!r} have the same color "
                    f"{other.color}; color masks need a unique color for each class."
                )
        colors = tuple(entry.color for entry in self.classes)
        return colors, tuple(entry.color for entry in ignored)

    def _encode_by_threshold(self, values: npt.NDArray[np.integer[Any]]) -> UInt8Array:
        above = self.ids.index(max(self.ids))
        indices = np.where(values >= self.threshold, above, 1 - above).astype(np.uint8)
        indices[np.isin(values, [entry.id for entry in self.ignored])] = IGNORE_INDEX
        return indices

    def unknown_labels(
        self, unknown: Mapping[int, int] | Mapping[Color, int]
    ) -> UnknownLabelsError:
        """Return the error for these ids or colors with their pixel counts, most frequent first."""
        shown = list(unknown.items())[:3]
        is_color = isinstance(shown[0][0], tuple)
        noun = "color" if is_color else "value"
        parts = [
            f"{count} {'pixel has' if count == 1 else 'pixels have'} the {noun} {value}"
            for value, count in shown
        ]
        if len(unknown) > len(shown):
            rest = sum(unknown.values()) - sum(count for _, count in shown)
            parts.append(f"{rest} pixels have {len(unknown) - len(shown)} other {noun}s")
        if is_color:
            expected = f"none of the {self.num_classes} classes of {self.source} has this color"
        else:
            verb = "is" if len(self.ignored_ids) == 1 else "are"
            expected = (
                f"the {self.num_classes} classes of {self.source} are {describe_ids(self.ids)}"
                f" and {describe_ids(self.ignored_ids) or 'nothing'} {verb} ignored"
            )
        return UnknownLabelsError(f"{', '.join(parts)}; {expected}.", unknown)


def find_class_list(root: Path) -> Path | None:
    """Return the class list of a data folder, `classes.json` before `classes.txt`, if any.

    Anything else with that name, such as a broken link, is returned too: reading it fails, while
    ignoring it would train on other classes.
    """
    paths = (root / name for name in ("classes.json", "classes.txt"))
    return next((path for path in paths if os.path.lexists(path)), None)


def check_num_entries(num_classes: int, num_ignored: int, source: str) -> None:
    """Raise a ConfigError if a class list is empty or too long, before it is parsed."""
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ConfigError(
            f"{source} has {num_classes} classes that are not ignored; expected 1 to {MAX_CLASSES}."
        )
    if num_ignored > MAX_ID:
        raise ConfigError(f"{source} has {num_ignored} ignored entries; expected at most {MAX_ID}.")


def labels_advice(unknown: Iterable[int] | Iterable[Color]) -> str:
    """Return the advice for mask values or colors that belong to no class."""
    values = sorted(unknown)
    if len(values) > _BLURRED:
        return (
            "So many different values indicate that anti-aliasing or JPEG compression blurred the "
            "mask. With two classes, pass --mask-threshold 128."
        )
    if isinstance(values[0], tuple):
        return "Fix the colors, or add a class or an `ignore` entry."
    # The option is complete, so that it can be copied.
    return f"Add a class, or pass --ignore-index {','.join(map(str, values))}."


def describe_ids(ids: Sequence[int]) -> str:
    """Format ids briefly: "0..10", "0, 7, 255", "0, 2, 4, ... 98"."""
    ordered = sorted(ids)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{ordered[0]}..{ordered[-1]}"
    if len(ordered) > 8:
        return f"{', '.join(map(str, ordered[:6]))}, ... {ordered[-1]}"
    return ", ".join(map(str, ordered))
