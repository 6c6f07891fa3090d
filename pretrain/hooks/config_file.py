"""config.yaml: the resolved configuration beside the run, written once it is certain that the run goes on."""

from pathlib import Path

import yaml

from ..checkpoint.manifest import write_synced
from ..config import RunConfig
from ..notice import notice
from ..settings import dump_config, flat
from ..state import TrainState
from ..writable import check_writable
from .base import Hook


class ConfigFile(Hook):
    """Writes RUN/config.yaml; a resume names what is set otherwise than before.

    Raises:
        ValueError: the file can not be written.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.path = config, config.path / "config.yaml"
        check_writable(self.path)

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Writes it."""
        if resumed and (changed := self._changed()):
            notice(f"settings that differ from those so far: {'; '.join(changed)}")
        self._write()

    def on_checkpoint(self, path: Path, state: TrainState) -> None:
        """A disk that was full at the start has room now."""
        if self.refused:
            self._write()

    def _changed(self) -> list[str]:
        """Each setting that the file has otherwise, and how."""
        try:
            before = flat(yaml.safe_load(self.path.read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            return []
        now = flat(yaml.safe_load(dump_config(self.config)))
        keys = [key for key in before | now if before.get(key) != now.get(key) and key not in ("name", "folder")]
        return [f"{key}={now.get(key)} (was {before.get(key)})" for key in keys]

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
