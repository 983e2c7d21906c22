from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.errors import ConfigError, DcnsegError
from dcnseg.inference import ray_engine
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import InputImage, find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.ray_engine import (
    OwnThreadStream,
    Share,
    connected,
    divide_cluster,
    predict_with_ray,
    start_journal,
)
from dcnseg.inference.remote_files import UrlPath
from dcnseg.inference.results import FileResult
from tests.conftest import Invoke
from tests.region_network import save_region_weights

KINDS = ("labels", "overlay", "regions")
# Ray's own code and processes warn.
quiet = pytest.mark.filterwarnings("ignore::Warning")


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected"),
    [
        ([{"CPU": 2}], 2, Share(2, 1, 0)),
        ([{"CPU": 2}], 0, Share(1, 2, 0)),
        ([{"CPU": 2}], 5, Share(5, 1, 0)),  # some wait, in case that the cluster grows
        ([{"CPU": 64}], 0, Share(16, 4, 0)),
        ([{"CPU": 8}, {"CPU": 4}], 3, Share(3, 4, 0)),
        ([{"CPU": 4}] * 3, 2, Share(2, 4, 0)),  # not 12 / 2, which no machine has
        ([{"CPU": 16, "GPU": 4}, {"CPU": 64}], 0, Share(4, 4, 1)),
        ([{"CPU": 16, "GPU": 1}, {"CPU": 4, "GPU": 1}], 0, Share(2, 4, 1)),
        ([], 0, Share(1, 1, 0)),
    ],
)
def test_workers_fit_the_machines(
    nodes: list[dict[str, float]], num_workers: int, expected: Share
) -> None:
    assert divide_cluster(nodes, num_workers, uses_gpus=True) == expected
    without = divide_cluster(nodes, num_workers, uses_gpus=False)
    assert without.num_gpus == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"No module named 'ray'\)\. Install it with `pip instal"):
        ray_engine.import_ray()


def test_other_threads_write_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    stream = OwnThreadStream(sys.stdout)
    thread = threading.Thread(target=lambda: print("other", file=stream))
    thread.start()
    thread.join()
    print("own", file=stream)
    assert capsys.readouterr() == ("own\n", "other\n")


class PrintingRay:
    """Stands for the module, and keeps the options of `init`."""

    options: dict[str, object] | None = None
    error: Exception | None = None

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("started")
        self.options = options
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        print("stopped")


def test_a_cluster_for_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    module = PrintingRay()
    with connected(module):
        print("results")
    assert capsys.readouterr() == ("results\n", "started\nstopped\n")
    assert module.options is not None
    assert module.options["address"] == "local"
    assert signal.getsignal(signal.SIGTERM) is handler
    module.error = Exception("The current node timed out\nmore")
    with (
        pytest.raises(DcnsegError, match=r"started \(The current node timed out\)"),
        connected(module),
    ):
        pass


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    module = PrintingRay()
    module.error = ConnectionError("no answer")
    text = (
        r"RAY_ADDRESS is '10\.0\.0\.1:6379', and no Ray cluster answers there \(no answer\)\. Cor"
    )
    with pytest.raises(ConfigError, match=text), connected(module):
        pass
    assert module.options is not None
    assert "address" not in module.options


def test_a_numbered_device_is_refused(network: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--device is 'cuda:1'; with --engine ray, expected aut"):
        predict_with_ray(network, tmp_path, [], tmp_path, KINDS, device="cuda:1")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two CPUs on this machine."""
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    module = ray_engine.import_ray()
    module.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    yield module
    module.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # Ray does not wait for its processes, about which Python warns


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_region_weights(tmp_path_factory.mktemp("weights") / "regions.safetensors")


@pytest.fixture
def network(weights: Path) -> Predictor:
    return Predictor.from_checkpoint(weights, device="cpu")


@pytest.fixture
def inputs(tmp_path: Path) -> list[InputImage]:
    """13 images, one of which cannot be read."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "05b.png").write_bytes(b"no image")
    return find_inputs([str(folder)])


def read_all(folder: Path) -> dict[str, bytes]:
    """The files without those that a killed worker was writing, which are hidden."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def without_place(result: FileResult) -> FileResult:
    return replace(result, outputs={}, cause=None)


@quiet
@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(
    ray: Any,
    network: Predictor,
    weights: Path,
    inputs: list[InputImage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = predict_files(network, inputs, tmp_path / "local", KINDS)
    out = tmp_path / "ray"
    ids = {image: number for number, image in enumerate(inputs, 1)}
    journals: list[Any] = []
    killed: list[int] = []
    finished: dict[int, int] = {}  # time of the label map's writing

    def start_and_note(module: Any) -> Any:
        journals.append(start_journal(module))
        return journals[-1]

    monkeypatch.setattr(ray_engine, "start_journal", start_and_note)

    def kill_one(result: FileResult) -> None:
        if killed:
            return
        done = ray.get(journals[0].finished_ids.remote()) | {ids[result.image]}
        begun = ray.get(journals[0].places.remote())
        for image in inputs:
            label_map = out / "labels" / f"{image.name}.png"
            if ids[image] in done and label_map.exists():
                finished[ids[image]] = label_map.stat().st_mtime_ns
        for image_id, place in begun.items():
            if image_id not in done:
                killed.append(int(place.split()[1]))
                os.kill(killed[0], signal.SIGKILL)
                return

    results = predict_with_ray(
        network, weights, inputs, out, KINDS, device="cpu", num_workers=2, on_result=kill_one
    )
    assert killed
    assert read_all(out) == read_all(tmp_path / "local")
    assert list(map(without_place, results)) == list(map(without_place, expected))
    assert finished
    for image in inputs:
        if ids[image] in finished:
            path = out / "labels" / f"{image.name}.png"
            assert path.stat().st_mtime_ns == finished[ids[image]]


@quiet
@pytest.mark.slow
def test_the_command_prints_what_the_local_engine_prints(
    ray: Any,
    invoke: Invoke,
    weights: Path,
    inputs: list[InputImage],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ("predict", weights, tmp_path / "images", "--device=cpu", "--save=labels", "--json")
    local = invoke(*arguments, "--out", tmp_path / "out")
    assert local.exit_code == 3
    files = read_all(tmp_path / "out")
    for path in (tmp_path / "out" / "labels").iterdir():
        path.unlink()
    capfd.readouterr()
    remote = invoke(*arguments, "--out", tmp_path / "out", "--overwrite", "--engine=ray")
    assert capfd.readouterr().out == ""  # of Ray
    assert (remote.stdout, remote.exit_code) == (local.stdout, 3)
    assert read_all(tmp_path / "out") == files
    again = invoke(*arguments, "--out", tmp_path / "out", "--skip-existing", "--engine=ray")
    assert "Predicted 0 of 13 images" in again.stderr
    assert "; 12 skipped because their outputs exist." in again.stderr


@quiet
@pytest.mark.slow
def test_urls(
    ray: Any, network: Predictor, weights: Path, inputs: list[InputImage], tmp_path: Path
) -> None:
    urls = find_inputs([f"local://{tmp_path}/images"], accept_urls=True)
    predict_files(network, urls, tmp_path / "local", KINDS)
    out = UrlPath(f"local://{tmp_path}/ray")
    results = predict_with_ray(network, weights, urls, out, KINDS, device="cpu", num_workers=1)
    assert read_all(tmp_path / "ray") == read_all(tmp_path / "local")
    (failed,) = (result for result in results if result.error)
    assert str(failed.error).startswith(f"local://{tmp_path}/images/05b.png: is not an image")
