"""Bundles that leave the house: folders in MONAI's form of weights, code, configs and card."""
