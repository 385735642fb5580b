"""sha256 of files and folders: what caches, provenance and checks know a content by."""

import hashlib
from pathlib import Path


def hash_path(path: str | Path) -> str:
    """sha256 of a file's bytes; of a folder the hash over its files' relative names and hashes."""
    path = Path(path)
    if path.is_dir():
        return hash_files([file for file in path.rglob("*") if file.is_file()], below=path)
    return hash_file(path)


def hash_file(path: str | Path) -> str:
    """Of a file alone: a folder raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_files(files: list[Path], *, below: Path) -> str:
    """The hash over files' names relative to a folder and their hashes."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(below)} {hash_path(file)}\n".encode())
    return digest.hexdigest()
