"""What the notebooks use: checks, hints, predictions, measurements, figures; each name loads when it is first used."""

import importlib

from minids.lab.show import print_log

HOMES = {  # no function in a module of its own name: whoever imports that would find it in the function's place
    "check": "notebook",
    "hint": "notebook",
    "status": "notebook",
    "mine": "notebook",
    "example": "notebook",
    "predict": "prediction",
    "fast": "budget",
    "minutes": "budget",
    "train_live": "training",
    "load_text": "training",
    "machine": "",
    "meter": "traffic",
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
    return getattr(module, name) if HOMES[name] else module
