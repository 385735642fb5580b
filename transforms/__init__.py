"""One array in, one array out (array.py); the same on dictionaries (dictionary.py)."""
