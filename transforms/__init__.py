"""One array in, one array out (array.py); the same on dictionaries (dictionary.py)."""

from transforms.dictionary import RandCropToBudgetd, RandJitterd, RandTranslated, Resampled, Sparsifyd, Windowsd

__all__ = ["RandCropToBudgetd", "RandJitterd", "RandTranslated", "Resampled", "Sparsifyd", "Windowsd"]
