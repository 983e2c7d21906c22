"""Saving, stopping, and the limit on non-finite steps; the entry point is `Safeguards`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.config import TrainConfig
from dcnseg.engine.distributed import SINGLE, World
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import explain_write_errors
from dcnseg.engine.saved_state import save_state
from dcnseg.engine.state import TrainingState, random_states
from dcnseg.engine.step import StepOutcome, TrainingStep
from dcnseg.errors import TrainingError, TrainingStoppedError


@dataclass
class Safeguards:
    """Saves checkpoints, and stops a run on request or when its loss stays non-finite.

    Several processes save and stop after the same step; the main one writes the file.
    """

    config: TrainConfig
    run: Path
    state: TrainingState
    step: TrainingStep
    listener: TrainingListener
    world: World = SINGLE
    _saved_at: float = field(default_factory=time.monotonic)

    def after_step(self, outcome: StepOutcome) -> None:
        """Count skipped steps, save a checkpoint if one is due, and stop if requested.

        Raises:
            TrainingError: too many steps in a row were not finite.
            TrainingStoppedError: the listener requested a stop.
        """
        partial = self.state.partial
        assert partial is not None  # an epoch is in progress
        if outcome is StepOutcome.OVERFLOWED:
            partial.amp_skipped += 1
        elif outcome is StepOutcome.SKIPPED:
            partial.skipped += 1
            self.state.skipped_in_a_row += 1
        else:
            self.state.skipped_in_a_row = 0
        if self.state.skipped_in_a_row >= self.config.nan_patience:
            error = TrainingError(
                f"The loss or gradient of {self.state.skipped_in_a_row} steps in a row was not "
                f"finite, up to step {partial.step} of epoch {self.state.epoch + 1}. The first "
                f"non-finite value is in {self.step.find_non_finite()}. The last good checkpoint "
                f"is {self.run / RESUME_STATE}. Start a new run with a lower --lr, a longer "
                "--warmup-epochs or --amp off."
            )
            raise self.world.explain(error)
        interval = 60 * self.config.checkpoint_minutes
        if interval and self.world.any(time.monotonic() - self._saved_at >= interval):
            self.save()
        self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """Save a checkpoint and raise a TrainingStoppedError if the listener requests a stop."""
        if self.world.any(self.listener.stop_requested()):
            self.save()
            raise TrainingStoppedError(f"{self.run} was stopped; its checkpoint is saved.")

    def save(self, *, is_final: bool = False) -> None:
        """Write the checkpoint; after non-finite steps, keep the last good one unless final."""
        if self.state.skipped_in_a_row and not is_final:
            return
        if self.world.size > 1:
            self.state.other_random = self.world.gather(random_states())[1:]
        path = self.run / RESUME_STATE
        if self.world.is_main:
            with explain_write_errors(path):
                save_state(path, self.state)
        self._saved_at = time.monotonic()
