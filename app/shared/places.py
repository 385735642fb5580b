"""Where the project's own files lie, in a checkout and in an installed wheel alike."""

from pathlib import Path


def root_folder() -> Path:
    """Holds app/, networks/, transforms/ and bundles/."""
    return Path(__file__).resolve().parents[2]


def app_folder() -> Path:
    """What MONAI Label takes for --app."""
    return root_folder() / "app"


def bundles_folder() -> Path:
    """Holds the stage files, for --config_file."""
    return root_folder() / "bundles"


def pretrained_folder() -> Path:
    """Holds a folder for each tokenizer that ships; an export has none."""
    return bundles_folder() / "pretrained"
