"""Saving, stopping, and the limit on non-finite steps; the entry point is `Safeguards`."""

from __future__ import annotations

import time
from pathlib import Path

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.config import TrainConfig
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import explain_write_errors
from dcnseg.engine.saved_state import save_state
from dcnseg.engine.state import TrainingState
from dcnseg.engine.step import StepOutcome, TrainingStep
from dcnseg.errors import TrainingError, TrainingStoppedError


class Safeguards:
    """Saves checkpoints, and stops a run on request or when its loss stays non-finite."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        state: TrainingState,
        step: TrainingStep,
        listener: TrainingListener,
    ) -> None:
        self._config = config
        self._run = run
        self._state = state
        self._step = step
        self._listener = listener
        self._saved_at = time.monotonic()

    def after_step(self, outcome: StepOutcome) -> None:
        """Count skipped steps, save a checkpoint if one is due, and stop if requested.

        Raises:
            TrainingError: too many steps in a row were not finite.
            TrainingStoppedError: the listener requested a stop.
        """
        self._count(outcome)
        if self._state.skipped_in_a_row >= self._config.nan_patience:
            raise TrainingError(self._explain_non_finite())
        interval = 60 * self._config.checkpoint_minutes
        if interval and time.monotonic() - self._saved_at >= interval:
            self.save()
        self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """Save a checkpoint and raise a TrainingStoppedError if the listener requests a stop."""
        if self._listener.stop_requested():
            self.save()
            raise TrainingStoppedError(f"{self._run} was stopped; its state is saved.")

    def save(self, *, is_final: bool = False) -> None:
        """Write the checkpoint; after non-finite steps, keep the last good one unless final."""
        if self._state.skipped_in_a_row and not is_final:
            return
        path = self._run / RESUME_STATE
        with explain_write_errors(path):
            save_state(path, self._state)
        self._saved_at = time.monotonic()

    def _count(self, outcome: StepOutcome) -> None:
        partial = self._state.partial
        assert partial is not None  # an epoch is in progress
        if outcome is StepOutcome.OVERFLOWED:
            partial.amp_skipped += 1
        elif outcome is StepOutcome.SKIPPED:
            partial.skipped += 1
            self._state.skipped_in_a_row += 1
        else:
            self._state.skipped_in_a_row = 0

    def _explain_non_finite(self) -> str:
        partial = self._state.partial
        assert partial is not None
        return (
            f"The loss or gradient of {self._state.skipped_in_a_row} steps in a row was not "
            f"finite, up to step {partial.step} of epoch {self._state.epoch + 1}. The first "
            f"non-finite value is in {self._step.find_non_finite()}. The last good checkpoint is "
            f"{self._run / RESUME_STATE}. Start a new run with a lower --lr, a longer "
            "--warmup-epochs or --amp off."
        )
