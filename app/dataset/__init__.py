"""The prepared layout on disk: its one reader, its one writer."""
