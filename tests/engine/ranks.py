"""Processes that share a run, started without torchrun: `run_checks`, and what they execute."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dcnseg.config import ModelConfig, Preprocessing, TrainConfig
from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.engine.distributed import SINGLE, World, join_world
from dcnseg.engine.evaluation import evaluate_run
from dcnseg.engine.listener import Step, TrainingListener
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.optim import build_loss, build_loss_weight, build_optimizer, build_schedule
from dcnseg.engine.state import TrainingState, build_average
from dcnseg.engine.step import StepOutcome, TrainingStep
from dcnseg.engine.training import resume, train
from dcnseg.models.segmenter import Segmenter, build_segmenter
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.processes import this_process
from tests.engine.runs import CPU

ROOT = Path(__file__).parents[2]
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


Check = tuple[str, Sequence[Any]]  # name of a function of this module, and its arguments


def run_checks(checks: Sequence[Check], size: int) -> list[list[Any]]:
    """Run functions one after the other, each in several processes.

    Returns:
        For each check the results of its processes: what it returned, the exception that it
        raised, or None if it was killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "checks").write_bytes(pickle.dumps((checks, size)))
        command = [sys.executable, "-m", "tests.engine.ranks", name]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        results: list[list[Any]] = pickle.loads((folder / "results").read_bytes())
        return results


def main() -> None:
    """Run checks in forked processes: importing torch takes longer than they do."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    checks, size = pickle.loads((folder / "checks").read_bytes())
    results = [fork_all(check, size, folder) for check in checks]
    (folder / "results").write_bytes(pickle.dumps(results))


def fork_all(check: Check, size: int, folder: Path) -> list[Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    children = []
    for rank in range(size):
        (folder / str(rank)).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.environ |= environment_of(rank, size, port)
            run_check(check, folder / str(rank))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    files = [folder / str(rank) for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def run_check(check: Check, path: Path) -> None:
    name, arguments = check
    function: Callable[..., Any] = globals()[name]
    try:
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    path.write_bytes(pickle.dumps(result))


def check_exchange() -> dict[str, Any]:
    """What the functions of `World` return."""
    with join_world() as world:
        return exchange(world)


def exchange(world: World) -> dict[str, Any]:
    def fail() -> None:
        raise ValueError(world.rank)

    errors = []
    try:
        world.on_main(fail)
    except Exception as error:
        errors.append(type(error).__name__)
    model = torch.nn.BatchNorm2d(2)
    assert model.running_mean is not None
    model.running_mean.fill_(world.rank)
    world.average_buffers(model)
    return {
        "mean": world.mean(torch.tensor([world.rank, 1.0])).tolist(),
        "any": [world.any(world.rank == 1), world.any(False)],
        "gather": world.gather(f"value {world.rank}"),
        "on_main": world.on_main(lambda: world.rank),
        "errors": errors,
        "part": world.part_of(range(5)),
        "running_mean": model.running_mean.tolist(),
        "explained": type(world.explain(ValueError("x"))).__name__,  # type: ignore[arg-type]
    }


def check_updates(name: str, accumulate: int, is_deep: bool) -> list[float]:
    """Compare 20 updates with those of one process; returns the largest difference of each."""
    with join_world() as world:
        return update(world, name, accumulate, is_deep)


def update(world: World, name: str, accumulate: int, is_deep: bool) -> list[float]:
    num_images = 2 * world.size * 2
    shared, alone = make_state(is_deep), make_state(is_deep)
    weights = CLASS_WEIGHTS if name != "focal" else None
    step, alone_step = (
        TrainingStep(
            state,
            build_loss(name, weights),
            CPU,
            None,
            weigh=build_loss_weight(name, weights),
            world=each,
        )
        for state, each in ((shared, world), (alone, SINGLE))
    )
    generator = torch.Generator().manual_seed(3)
    losses: list[float] = []
    alone_losses: list[float] = []
    differences = []
    for _ in range(20):
        batches = [random_batch(num_images, generator) for _ in range(accumulate)]
        own = slice(
            world.rank * num_images // world.size, (world.rank + 1) * num_images // world.size
        )
        losses.clear()
        alone_losses.clear()
        outcome = step(
            BatchGroup(accumulate, [(images[own], labels[own]) for images, labels in batches]),
            lambda _size, loss: losses.append(loss),
        )
        assert outcome is StepOutcome.UPDATED
        alone_step(BatchGroup(accumulate, batches), lambda _size, loss: alone_losses.append(loss))
        torch.testing.assert_close(losses, alone_losses, atol=1e-5, rtol=1e-5)
        differences.append(largest_difference(shared, alone))
    return differences


def check_skips() -> list[str]:
    """A step that is not finite in one process is skipped by all."""
    with join_world() as world:
        return skip(world)


def skip(world: World) -> list[str]:
    state = make_state(is_deep=False)
    step = TrainingStep(
        state, build_loss("ce", None), CPU, None, weigh=build_loss_weight("ce", None), world=world
    )
    outcomes = []
    for broken in (None, 1, None):
        images, labels = random_batch(2, torch.Generator().manual_seed(world.rank))
        if broken == world.rank:
            images[0, 0, 0, 0] = torch.nan
        outcomes.append(step(BatchGroup(1, [(images, labels)])).name)
    images[:] = torch.nan if world.rank == 1 else 0.0
    step(BatchGroup(1, [(images, labels)]))
    total = sum(float(p.detach().sum()) for p in state.model.parameters())
    return [*outcomes, step.find_non_finite(), str(total)]


class KillItself(TrainingListener):
    """Ends the process of rank 1 after the first step of the second epoch."""

    def step_done(self, step: Step) -> None:
        if this_process().rank == 1 and (step.epoch, step.step) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)


class StopRequest(TrainingListener):
    """Requests a stop in rank 1 only, after the first step."""

    def stop_requested(self) -> bool:
        return this_process().rank == 1


def check_training(config: TrainConfig, run: Path) -> Any:
    return train(config, run).scores


def check_killed(config: TrainConfig, run: Path) -> Any:
    return train(config, run, listener=KillItself()).scores


def check_stopped(config: TrainConfig, run: Path) -> Any:
    return train(config, run, listener=StopRequest())


def check_restarted(config: TrainConfig, run: Path) -> Any:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return train(config, run).scores


def check_resumed(run: Path, epochs: int) -> Any:
    return resume(run, epochs=epochs).scores


def check_evaluation(run: Path, data: Path) -> Any:
    return evaluate_run(run, data, "all", device="cpu")


def make_state(is_deep: bool) -> TrainingState:
    """A network in evaluation mode: with deformable layers, or with two layers."""
    torch.manual_seed(0)
    lr = 0.01 if is_deep else 0.05
    config = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=2)
    layers = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    model = build_segmenter(config, 3) if is_deep else cast(Segmenter, nn.Sequential(*layers))
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            assert module.conv_offset.bias is not None
            # Away from whole pixels, where the derivative of bilinear sampling jumps.
            nn.init.uniform_(module.conv_offset.bias, 0.2, 0.4)
    optimizer = build_optimizer(model, "sgd", lr=lr, offset_lr=lr / 10, weight_decay=1e-4)
    state = TrainingState(
        model=model,
        average=build_average(model, 0.9),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, total_steps=40, warmup_steps=2, power=0.9),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        preprocessing=Preprocessing(),
    )
    state.model.eval()
    return state


def random_batch(num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and labels; the number of ignored pixels differs between the images."""
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    labels = torch.randint(3, (num_images, 32, 32), generator=generator)
    for index in range(num_images):
        labels[index, : 3 * index] = IGNORE_INDEX
    return images, labels


def largest_difference(left: TrainingState, right: TrainingState) -> float:
    assert left.average is not None
    assert right.average is not None
    pairs = [
        (one, other)
        for a, b in ((left.model, right.model), (left.average, right.average))
        for one, other in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


if __name__ == "__main__":
    main()
