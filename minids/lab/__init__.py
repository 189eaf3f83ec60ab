"""What the notebooks use: checks, hints, predictions, measurements, figures; each name loads when it is first used."""

import importlib

from minids.lab.show import print_log

HOMES = {
    "check": "check",
    "hint": "check",
    "status": "check",
    "mine": "check",
    "example": "example",
    "predict": "predict",
    "fast": "budget",
    "minutes": "budget",
    "train_live": "training",
    "load_text": "training",
    "machine": "",
    "meter": "meter",
    "compiled": "",
    "explore": "explorer",
    "plots": "",
}
__all__ = sorted(HOMES)

print_log()


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"minids.lab has no {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(f"minids.lab.{HOMES[name] or name}")
    value = getattr(module, name) if HOMES[name] else module
    globals()[name] = value  # over the submodule of the same name, which the import has put here
    return value
