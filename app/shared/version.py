"""The one version number: of the package, its bundles and their cards."""

VERSION = "0.1.0"
