"""The project's code as one package of another name, so that two bundles in one process never share a module.

Imports, and strings that name a module of ours, are found in the syntax tree and changed where they stand; everything
else stays as it was written.
"""

import ast
import hashlib
import re
from pathlib import Path

from app.shared.places import root_folder

PACKAGES = ("app", "networks", "transforms")
MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
BEGINS_MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})\.[\w.]*")


def package_name(name: str, version: str, sources: dict[str, str]) -> str:
    """A name of bundle, version and code: two packages of one name hold the same code."""
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(f"{path}\n{sources[path]}\n".encode())
    plain = re.sub(r"\W", "_", f"{name}_{version}", flags=re.ASCII).lower()
    return f"{plain if plain[0].isalpha() else 'bundle_' + plain}_{digest.hexdigest()[:8]}"


def read_sources() -> dict[str, str]:
    """Every Python file of ours by its path below the root."""
    root = root_folder()
    files = sorted(file for package in PACKAGES for file in (root / package).rglob("*.py"))
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def write_package(folder: Path, sources: dict[str, str], *, name: str, version: str) -> None:
    """The sources below `folder`/`name`, naming each other by that name."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f'"""The code of this bundle: Voxelingo {version}, under a name of its own."""\n'
    )
    for path, text in sources.items():
        file = package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(renamed(text, name), encoding="utf-8")


def renamed(source: str, name: str) -> str:
    """The source with every module of ours below the package `name`."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    for line, column in sorted(_places(source), reverse=True):
        text = lines[line - 1]
        lines[line - 1] = text[:column] + f"{name}.".encode() + text[column:]
    return b"".join(lines).decode()


def renamed_target(value: str, name: str) -> str:
    """A config's `_target_` or expression with modules of ours below the package `name`."""
    return re.sub(rf"(?<![\w.@#'\"/])(?=(?:{'|'.join(PACKAGES)})\.\w)", f"{name}.", value)


def _places(source: str) -> set[tuple[int, int]]:
    """Line and byte column of each name of a module of ours."""
    rows = [line.encode() for line in source.splitlines(keepends=True)]
    places = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module.split(".")[0] in PACKAGES:
                start = re.match(rb"from\s+", rows[node.lineno - 1][node.col_offset :]).end()
                places.add((node.lineno, node.col_offset + start))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    if alias.asname is None:
                        raise ValueError(
                            f"line {alias.lineno}: import {alias.name} must be from ... import, or have an as"
                        )
                    places.add((alias.lineno, alias.col_offset))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            places |= _inside_quotes(rows, node, rb"[rR]?[\"']")
        elif isinstance(node, ast.JoinedStr) and _begins_module(node):
            places |= _inside_quotes(rows, node, rb"[fF][\"']")
    return places


def _begins_module(node: ast.JoinedStr) -> bool:
    first = node.values[0] if node.values else None
    return isinstance(first, ast.Constant) and BEGINS_MODULE.fullmatch(first.value) is not None


def _inside_quotes(rows: list[bytes], node: ast.expr, opening: bytes) -> set[tuple[int, int]]:
    """Where a string's text begins; none for a part of an f-string, whose place older Pythons do not give."""
    match = re.match(opening, rows[node.lineno - 1][node.col_offset :])
    return {(node.lineno, node.col_offset + match.end())} if match else set()
