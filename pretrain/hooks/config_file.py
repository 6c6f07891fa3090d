"""config.yaml: the resolved configuration beside the run, written once it is certain that the run goes on."""

from ..checkpoint.manifest import write_synced
from ..config import RunConfig, dump_config
from ..state import TrainState
from .base import Hook


class ConfigFile(Hook):
    """Writes RUN/config.yaml."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_start(self, state: TrainState, *, resumed: bool) -> None:
        """Replaces the file in one move."""
        path = self.config.path / "config.yaml"
        partial = path.with_suffix(".tmp")
        write_synced(partial, dump_config(self.config))
        partial.replace(path)
