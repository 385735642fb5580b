"""Scans to tokens and back: CTTokenizer, token files, tokenize, reconstruct."""
