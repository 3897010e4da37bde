"""What a run is: its resolved config and its data; and what computes it."""

from __future__ import annotations

from model.config import HardwareConfig, JournalConfig, Section
from model.errors import UserError
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.stream.manifest import DatasetManifest


class Machine(Section):
    """What a run is computed with: nothing that decides its result."""

    hardware: HardwareConfig = HardwareConfig()
    journal: JournalConfig = JournalConfig()


def read_run(folder: RunFolder) -> tuple[RunConfig, DatasetManifest]:
    """The resolved config and the dataset manifest of a run, which must belong together.

    Raises:
        UserError: one is missing or unreadable, or the manifest is not the one that the config names.
    """
    config = validated(RunConfig, read_yaml(folder.config), folder.config.name)
    manifest = DatasetManifest.read(folder.dataset)
    if manifest.digest != config.dataset.digest:
        raise UserError(f"{folder.dataset}: not the manifest that config.yaml names; run build-config again")
    return config, manifest
