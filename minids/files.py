"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

import errno
import json
import os
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_files(folder, files):
    """Let each of `files` (name to writer) write a temporary file in `folder`; when all are whole, rename them."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, write in files.items():
            write(temporary[name])
            sync(temporary[name])
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


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
    words = str(error)
    in_words = "No space left" in words or re.search(r"os error (27|28|122)\b", words)
    return getattr(error, "errno", None) in FULL or bool(in_words)
