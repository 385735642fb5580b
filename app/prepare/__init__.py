"""Raw scans to volumes and prepared datasets.

`read_scan` gives what a path holds as volumes in HU that passed the gate; `normalise` puts one on the RAS grid;
`prepare` does both for a whole cohort and writes the prepared layout.
"""

from app.prepare.findings import Finding
from app.prepare.geometry import Normalised, normalise
from app.prepare.volume import RawScan, read_scan
from app.shared.codes import CODES
from app.shared.refusals import Refused

__all__ = ["CODES", "Finding", "Normalised", "RawScan", "Refused", "normalise", "read_scan"]
