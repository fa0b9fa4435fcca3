"""Which files a data set's folders and list files name; nothing outside the data set's root is ever named.

A list file is somebody else's text: a line with `..`, an absolute path or a link that leads out of the root is an
error, not a file that is read.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dance_seg.errors import DataError, short

MAX_NAME, MAX_PARTS = 255, 64  # bytes of the name of a file, and folders above it, as file systems have them
MAX_LIST_BYTES = 256 << 20  # of a list file; a million lines have a quarter


def data_root(root: str | Path, layout: str) -> Path:
    """The root of a data set, which has to be a folder.

    Raises DataError, saying what is expected there, when it is not.
    """
    path = Path(root).expanduser()
    if "\0" in str(path) or not path.is_dir():
        what = "is a file, not a folder" if path.is_file() else "is missing" if "\0" not in str(path) else "is no path"
        raise DataError(f"{str(path)!r} {what}; data.args.root is the folder that holds {layout}")
    return path


def inside(root: Path, relative: str, said_by: Path) -> Path:
    """The path of a file that a list names, relative to the root.

    Raises DataError when it would lead out of the root: by `..`, as an absolute path, through a link or by NUL.
    """
    parts = relative.replace("\\", "/").split("/")
    if any(len(part.encode(errors="surrogatepass")) > MAX_NAME for part in parts) or len(parts) > MAX_PARTS:
        raise DataError(f"{said_by}: {short(relative)} is no name of a file: it is too long")
    if "\0" in relative or ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise DataError(f"{said_by}: {short(relative)} leads out of {root}; name files relative to that folder")
    return refuse_outside(root.joinpath(*parts), root)


def refuse_outside(path: Path, root: Path) -> Path:
    """The path itself; raises DataError when links lead from it out of the root."""
    target, real_root = os.path.realpath(path), os.path.realpath(root)
    if target != real_root and not target.startswith(os.path.join(real_root, "")):
        raise DataError(
            f"{path} is a link that leads out of {root}, to {target}; nothing outside the root is read: "
            "make data.args.root the folder that really holds the files"
        )
    return path


def list_folders(folder: Path, root: Path) -> list[Path]:
    """The folders in a folder, in order of name; hidden ones are left out."""
    refuse_outside(folder, root)
    found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return [refuse_outside(path, root) for path in sorted(found)]


def list_files(folder: Path, root: Path, suffixes: Sequence[str], *, recurse: bool = False) -> dict[str, Path]:
    """The files of a folder with one of the suffixes: name without suffix, relative to the folder -> path.

    In order of name; hidden files are left out. Raises DataError when a link leads out of the root, a folder below is
    a link (its files would be listed twice or never end), or two files differ only in their suffix.
    """
    found: dict[str, Path] = {}
    refuse_outside(folder, root)
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                refuse_outside(path, root)
            if entry.is_dir():
                if recurse and entry.is_symlink():
                    raise DataError(f"{path} is a link to a folder; put the folder itself there")
                if recurse:
                    waiting.append(path)
            elif path.suffix.lower() in suffixes:
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    raise DataError(f"{path} and {found[name].name} differ only in their suffix; keep one of them")
                found[name] = path
    return dict(sorted(found.items()))


def what_is_there(folder: Path) -> str:
    """What a folder holds, by suffix, for an error message; such as '12 .tif, 3 folders'."""
    if not folder.is_dir():
        return "no such folder"
    kinds: Counter[str] = Counter()
    for entry in os.scandir(folder):
        kinds["folders" if entry.is_dir() else Path(entry.name).suffix.lower() or "files without suffix"] += 1
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5)) or "nothing"


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a list file with their numbers from 1; blank lines and those that begin with # are left out.

    Raises DataError when the file cannot be read as text.
    """
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; a list of files has {MAX_LIST_BYTES:,} at most")
        text = path.read_text(encoding="utf-8-sig")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise DataError(f"{path} is not a text file in UTF-8") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def some(names: Iterable[object], most: int = 5) -> str:
    """The first few of many names, in a sentence.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
