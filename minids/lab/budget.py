"""How long the training cells of the lessons take: as the lesson says; seconds where tests run them (MINIDS_FAST)."""

import os

SECONDS = 4  # of each training cell in a test: it shows that the cell runs, its figures mean nothing


def fast():
    """Whether MINIDS_FAST is set: the tests' short form of every long cell."""
    return bool(os.environ.get("MINIDS_FAST"))


def minutes(full):
    """`full` minutes for a cell that trains; a few seconds where MINIDS_FAST is set, and it says so."""
    if not fast():
        return full
    whole = f"{full:g} minute{'s' * (full != 1)}"
    print(f"MINIDS_FAST is set: {SECONDS} seconds instead of {whole}, so the figures below mean nothing")
    return SECONDS / 60
