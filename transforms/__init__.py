"""One array in, one array out; the same on dictionaries in dictionary.py.

The dictionary twins are imported when first asked for: they bring MONAI, which takes seconds, and arrays need none of
it.
"""

__all__ = [
    "RandAcquisitiond",
    "RandAffined",
    "RandCropToBudgetd",
    "RandJitterd",
    "RandStructuresd",
    "RandTranslated",
    "Resampled",
    "Sparsifyd",
    "Windowsd",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from transforms import dictionary

        return getattr(dictionary, name)
    raise AttributeError(f"module 'transforms' has no attribute {name!r}")
