"""Scans with words: manifests, published layouts, rows."""
