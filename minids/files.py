"""Files that are whole or not there: written under a temporary name, synced, then renamed; safetensors read so."""

import contextlib
import errno
import json
import os
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INDEX = "model.safetensors.index.json"
CHUNK = 2**28  # bytes that are read of a safetensors file before it is opened anew


class CheckpointFormatError(ValueError):
    """Weights that do not fit the configuration; the message names them."""


def replace_files(folder, files):
    """Let each of `files` (name to writer) write a temporary file in `folder`; when all are whole, rename them.

    The folder is made where it is missing, and none is left behind where that fails.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    mask = os.umask(0)
    os.umask(mask)
    try:
        for name, write in files.items():
            write(temporary[name])
            temporary[name].chmod(0o666 & ~mask)  # safetensors leaves it to its owner alone
            sync(temporary[name])
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # it holds what was written
                folder.rmdir()


def replace_file(path, write):
    """Let `write` fill a temporary file beside `path`, then put it in its place: never half a file."""
    replace_files(path.parent, {path.name: write})


def write_json(path, value):
    """Put `value`, as JSON, in the place of the file `path`."""
    replace_file(path, json_writer(value))


def json_writer(value):
    """A writer, for replace_files, of `value` as JSON."""
    return lambda path: path.write_text(json.dumps(value, indent=2) + "\n")


def sync(path):
    """Bring a file or a folder to the disk (folders only where the system can)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_is_full(error):
    """Whether `error` says so: by its number, or in words (safetensors and tokenizers have classes of their own)."""
    in_words = re.search(r"No space left|os error (27|28|122)\b", str(error))
    return getattr(error, "errno", None) in FULL or bool(in_words)


def weight_files(folder):
    """The safetensors files of a checkpoint; raises FileNotFoundError naming those that are missing."""
    index, files = folder / INDEX, [folder / "model.safetensors"]
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointFormatError(f"{index} is not a whole index of shards; fetch it again") from None
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; minids reads safetensors only")
    return files


class Shards(dict):
    """{name of a tensor: its file} of safetensors files; raises CheckpointFormatError naming a damaged one.

    What was read of a mapped file counts as resident until the file is closed: so it is opened anew after each CHUNK.
    """

    def __init__(self, files):
        for path in files:
            self |= dict.fromkeys(open_safetensors(path).keys(), path)
        self.path, self.reader, self.taken = None, None, 0

    def tensor(self, name):
        """The tensor of that name, on the CPU."""
        if self[name] != self.path or self.taken >= CHUNK:
            self.path, self.reader, self.taken = self[name], open_safetensors(self[name]), 0
        tensor = self.reader.get_tensor(name)
        self.taken += tensor.nbytes
        return tensor


def open_safetensors(path):
    """A reader of one safetensors file; raises CheckpointFormatError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise CheckpointFormatError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None
