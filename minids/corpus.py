"""Text to learn from, in files: for training and held out, with what gzip and xz make of it.

A corpus is a list of files. A stable hash of a file's relative path decides whether it is held out (10% are), so the
split is the same on every machine, and a model is measured on files that it never saw. gzip and xz on the held-out
files are the anchors: a model that predicts no better than they compress has learnt nothing that matters.

Files count only where they are UTF-8 text; a file with the bytes of another counts once.
"""

import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from minids.files import replace_file

HELD_OUT = 10  # percent of the files
BLOCKS = 100  # a corpus of one file is split into as many
HUB_BYTES = 256 * 2**20  # what is read of a hub dataset
STDLIB_SKIPS = {"site-packages", "dist-packages", "idlelib", "lib2to3"}  # others' code; an application; a copy
SKIPS = {"test", "tests", "__pycache__"}


class DataError(ValueError):
    """Text that cannot be trained on; the message says what was given and what to do."""


@dataclass
class Corpus:
    """Files as bytes, for training and held out; `hash` identifies both, `note` says what was left out or split."""

    name: str
    train: list = field(repr=False)
    heldout: list = field(repr=False)
    note: str = ""
    cache_dir: Path | None = None

    @cached_property
    def hash(self):
        """What identifies the texts and their split: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            digest.update(len(part).to_bytes(8, "little"))
            for text in part:
                digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()[:16]

    @cached_property
    def gzip_bpb(self):
        """Bits per held-out byte of gzip -9, file by file."""
        return self._anchor("gzip", lambda: sum(len(gzip.compress(text, 9)) for text in self.heldout))

    @cached_property
    def xz_bpb(self):
        """Bits per held-out byte of xz -9e over all held-out files as one; NaN where Python has no lzma."""
        try:
            import lzma
        except ImportError:
            return math.nan
        return self._anchor("xz", lambda: len(lzma.compress(b"".join(self.heldout), preset=9 | lzma.PRESET_EXTREME)))

    def _anchor(self, kind, compressed_bytes):
        def compute(path):
            path.write_text(json.dumps(8 * compressed_bytes() / sum(map(len, self.heldout))))

        return cached(f"{kind}-{self.hash}.json", self.cache_dir, compute, lambda path: float(path.read_text()))


# Where text comes from -------------------------------------------------------------------------------------------


def load_corpus(spec="stdlib", cache_dir=None):
    """The Corpus that `spec` names: "stdlib", "installed" (every Python package too), a file, a folder, "hf:NAME".

    Says on stderr what was left out. Raises DataError where there is no text, or not enough for two files.
    """
    spec, skipped, blocks = str(spec), 0, ""
    if spec in ("stdlib", "installed"):
        named, skipped = read_files(python_files(spec))
    elif spec.startswith("hf:"):
        named = hub_rows(spec[3:])
    elif Path(spec).is_dir():
        named, skipped = read_files(walk(Path(spec), {"__pycache__"}, hidden=False))
    elif Path(spec).is_file():
        named, skipped = read_files([(Path(spec).name, Path(spec))])
    else:
        raise DataError(f"there is no data {spec!r}; give stdlib, installed, a file, a folder or hf:NAME")
    if not named:
        raise DataError(f"{spec} has no text: {skipped} files are not UTF-8, the others are empty; give other --data")
    if len(named) == 1:
        named = split_text(*named[0])
        blocks = f"one file, split into {len(named)} blocks"
    train, heldout = split(named, spec)
    left_out = f"{skipped} files are not UTF-8 text and left out" if skipped else ""
    name = spec if spec in ("stdlib", "installed") or spec.startswith("hf:") else Path(spec).resolve().name
    corpus = Corpus(name, train, heldout, "; ".join(filter(None, (blocks, left_out))), cache_dir)
    if corpus.note:
        print(f"{name}: {corpus.note}", file=sys.stderr)
    return corpus


def python_files(spec):
    """(name, path) of the standard library's modules, without tests, IDLE and 2to3; "installed" adds packages."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    files = [(name, path) for name, path in walk(stdlib, SKIPS | STDLIB_SKIPS) if name.endswith(".py")]
    if spec == "installed":
        for folder in dict.fromkeys((paths["purelib"], paths["platlib"])):
            files += [(f"packages/{name}", path) for name, path in walk(Path(folder), SKIPS) if name.endswith(".py")]
    return files


def walk(folder, skips, hidden=True):
    """Sorted (relative name with /, path) of the files below `folder`, without folders in `skips`."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in skips and (hidden or name[0] != ".")]
        paths = [Path(root, name) for name in files if hidden or name[0] != "."]
        found += [(path.relative_to(folder).as_posix(), path) for path in paths]
    return sorted(found)


def read_files(files):
    """[(name, bytes)] of the files that are UTF-8 text, each content once, and the number of those that are not."""
    named, seen, skipped = [], {b""}, 0
    for name, path in files:
        text = read_text(path)
        if text is None:
            skipped += 1
        elif (digest := hashlib.sha256(text).digest() if text else b"") not in seen:
            seen.add(digest)
            named.append((name, text))
    return named, skipped


def read_text(path):
    """The bytes of a file; None where it cannot be read, or is not UTF-8 text."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(8192)
            if b"\0" in head:  # a binary file, perhaps a large one
                return None
            text = head + file.read()
        text.decode()
        return text
    except (OSError, UnicodeDecodeError):
        return None


def hub_rows(name):
    """[(row number, text)] of the train split of the hub dataset NAME or NAME:CONFIG, up to HUB_BYTES."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"hf:{name} needs the package datasets; install it: pip install 'minids[data]'") from None
    try:
        rows, named, size = load_dataset(*name.split(":", 1), split="train", streaming=True), [], 0
        for number, row in enumerate(rows):
            texts = [value for key, value in row.items() if isinstance(value, str) and key in ("text", "content")]
            text = (texts or [value for value in row.values() if isinstance(value, str)] or [""])[0].encode()
            named += [(str(number), text)] if text else []
            size += len(text)
            if size >= HUB_BYTES:
                break
    except Exception as error:  # datasets raises classes of its own, of the network and of the file formats
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"hf:{name} cannot be read by the package datasets: {reason[0]}") from None
    return named


def split(named, spec):
    """(train, heldout) texts of [(name, text)], by a stable hash of the name, never one of them empty."""
    if len(named) < 2:
        raise DataError(f"{spec} is too short to hold a part of it out; give more text")
    order = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name, _ in named}
    chosen = {name for name, value in order.items() if value % 100 < HELD_OUT}
    if not 0 < len(chosen) < len(named):
        chosen = {min(order, key=order.get)}
    return [text for name, text in named if name not in chosen], [text for name, text in named if name in chosen]


def split_text(name, text):
    """One text as [(name:i, part)] of about equal parts that end where lines end, where there are lines."""
    text = text.decode()
    size, start, parts = max(1, len(text) // BLOCKS), 0, []
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 4 * size) + 1 or start + size
        parts.append((f"{name}:{len(parts)}", text[start:end].encode()))
        start = end
    return parts


# The cache -------------------------------------------------------------------------------------------------------


def cached(name, cache_dir, write, read):
    """What `read(path)` gives of the cached file `name`, which `write(path)` makes where it is missing or damaged.

    The cache is `cache_dir`, else the environment's MINIDS_CACHE, else ~/.cache/minids. Where it cannot be written
    (a full disk), the work is done in a temporary folder.
    """
    folder = Path(cache_dir or os.environ.get("MINIDS_CACHE") or Path.home() / ".cache" / "minids")
    with contextlib.suppress(Exception):  # missing or damaged (tokenizers raises a bare Exception): make it again
        return read(folder / name)
    with tempfile.TemporaryDirectory() as elsewhere:
        made = Path(elsewhere, name)
        write(made)
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, lambda path: shutil.copyfile(made, path))
        return read(made)
