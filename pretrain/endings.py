"""How a run ends, as the exit codes of its processes."""

from enum import IntEnum


class Ending(IntEnum):
    """0: all steps are done. 2 is a refusal (see refusal.py), and 1 what Python says of any other error."""

    FINISHED = 0
    """All steps are done."""
    SPIKED = 70
    """A spike in the gradient, and train.on_spike=stop, or rollbacks that did not help; nothing was saved for it."""
    STALLED = 71
    """The watchdog ended the process: no step for train.watchdog_minutes. Its stacks are in RUN/stalls."""
    SAVED = 75
    """Stopped by a signal or the time limit, with a checkpoint of its last step: run the same command again."""
