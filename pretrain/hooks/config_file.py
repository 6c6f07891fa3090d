"""config.yaml: the resolved configuration beside the run, written once it is certain that the run goes on."""

from pathlib import Path

from ..checkpoint.manifest import write_synced
from ..config import RunConfig, dump_config
from ..state import TrainState
from ..writable import check_writable
from .base import Hook


class ConfigFile(Hook):
    """Writes RUN/config.yaml.

    Raises:
        ValueError: the file can not be written.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.path = config, config.path / "config.yaml"
        check_writable(self.path)

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Writes it."""
        self._write()

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A disk that was full at the start has room now."""
        if self.refused:
            self._write()

    def _write(self) -> None:
        """Replaces the file in one move."""
        partial = self.path.with_suffix(".tmp")
        try:
            write_synced(partial, dump_config(self.config))
            partial.replace(self.path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self.refused = ""
