"""What a call writes, and what it leaves; entry point `plan_outputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dcnseg.data.class_map import ClassMap
from dcnseg.errors import ConfigError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.parts import Part
from dcnseg.inference.region_files import MERGED_REGIONS, merge_region_results
from dcnseg.inference.remote_files import (
    AnyPath,
    UrlPath,
    has_unmarked_content,
    is_marked,
    mark,
)
from dcnseg.inference.results import FileResult
from dcnseg.inference.writers import OUTPUT_FOLDERS, get_output_paths


@dataclass(frozen=True)
class OutputTask:
    """An image and the files to write for it."""

    image: InputImage
    outputs: dict[str, AnyPath]  # by kind
    raster_outputs: dict[str, AnyPath]  # if it is predicted window by window
    image_id: int  # in files of regions; counts from 1, over the images of all parts


@dataclass(frozen=True)
class OutputPlan:
    """The images of a call, and the files to write."""

    tasks: Sequence[OutputTask]  # to predict
    existing: Sequence[OutputTask]  # to skip, because all outputs exist
    folders: Sequence[AnyPath]  # to mark as written by dcnseg
    merged_regions: AnyPath | None  # the file with the regions of all images

    def skipped_results(self) -> list[FileResult]:
        """Return the results of the images to skip."""
        return [FileResult(task.image, task.outputs, {}, is_skipped=True) for task in self.existing]

    def mark_folders(self) -> None:
        """Mark the folders to write to as written by dcnseg."""
        for folder in self.folders:
            mark(folder)

    def merge_regions(self, results: Iterable[FileResult], class_map: ClassMap) -> None:
        """Merge the regions of all images into one file, if regions are written.

        Raises:
            DataError: The regions of a skipped image cannot be read.
        """
        if self.merged_regions is None:
            return
        ids = {task.image: task.image_id for task in (*self.tasks, *self.existing)}
        by_id = {ids[result.image]: result for result in results if "regions" in result.outputs}
        if by_id:
            merge_region_results(self.merged_regions, by_id, class_map)


def plan_outputs(
    images: Sequence[InputImage],
    out: AnyPath,
    kinds: Sequence[str],
    *,
    skip_existing: bool = False,
    refuse_existing: bool = False,
    part: Part | None = None,
) -> OutputPlan:
    """Choose the images to predict and the files to write for them.

    Args:
        images: The images of all parts.
        out: The output folder, which may be a URL.
        kinds: Outputs to write, see OUTPUT_KINDS.
        skip_existing: Skip images with all outputs present.
        refuse_existing: Refuse to replace outputs.
        part: The part of the images to predict; None: all.

    Raises:
        ConfigError: An output subfolder has files that dcnseg did not write, or outputs exist and
            `refuse_existing` is set.
    """
    ids = {image: number for number, image in enumerate(images, 1)}
    merged = out / (f"regions-{part.number}-of-{part.count}.json" if part else MERGED_REGIONS)
    folders = _find_folders_to_mark(out, kinds, merged)
    exists = _existence_check(out, is_needed=skip_existing or refuse_existing)
    tasks: list[OutputTask] = []
    existing: list[OutputTask] = []
    for image in part.select(images) if part else images:
        paths = get_output_paths(out, image.name, kinds)
        raster_paths = get_output_paths(out, image.name, kinds, is_raster=True)
        task = OutputTask(image, paths, raster_paths, ids[image])
        done = [each for each in (paths, raster_paths) if all(map(exists, each.values()))]
        if skip_existing and done:
            existing.append(replace(task, outputs=done[0]))
        else:
            tasks.append(task)
    if refuse_existing:
        files = [{*task.outputs.values(), *task.raster_outputs.values()} for task in tasks]
        _refuse_existing([path for paths in files for path in sorted(paths, key=str)], exists, part)
    return OutputPlan(tasks, existing, folders, merged if "regions" in kinds else None)


def _existence_check(out: AnyPath, *, is_needed: bool) -> Callable[[AnyPath], bool]:
    """Return a function that tells whether a file in the output folder exists."""
    if isinstance(out, UrlPath) and is_needed:  # one list, because each request takes long
        return set(out.find()).__contains__
    return lambda path: path.is_file()


def _refuse_existing(
    outputs: Iterable[AnyPath], exists: Callable[[AnyPath], bool], part: Part | None
) -> None:
    found = [path for path in outputs if exists(path)]
    if found:
        of_part = f" of part {part}" if part else ""
        raise ConfigError(
            f"{len(found)} outputs{of_part} exist, for example {found[0]}. Add --skip-existing to "
            "predict only the other images, or --overwrite to replace the files."
        )


def _find_folders_to_mark(
    out: AnyPath, kinds: Sequence[str], merged: AnyPath
) -> tuple[AnyPath, ...]:
    """Return the output folder, or its subfolders if it has files that dcnseg did not write.

    Raises:
        ConfigError: A subfolder has such files (masks, for example), which could be overwritten.
    """
    if not has_unmarked_content(out):
        return (out,)
    folders = tuple(out / OUTPUT_FOLDERS[kind] for kind in kinds)
    regions = out / OUTPUT_FOLDERS["regions"]
    if "regions" in kinds and merged.exists() and not is_marked(regions):
        raise ConfigError(
            f"--out is {out}, but {merged} exists and was not written by dcnseg. Use another "
            "--out, or rename the file."
        )
    for folder in folders:
        if has_unmarked_content(folder):
            raise ConfigError(
                f"--out is {out}, but {folder} contains files and is not marked as dcnseg output; "
                "predictions could overwrite the files. Use another --out, or delete the folder if "
                "it contains only old predictions."
            )
    return folders
