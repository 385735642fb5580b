"""Tokens and text: rows of text about scans, alignment of a language model, answers, and what they are worth."""
