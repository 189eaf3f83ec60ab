"""A Python that does not find Triton, as on macOS and Windows."""

HIDE = """
import sys


class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):  # such as find_distributions, by which matplotlib finds Jupyter's backend
        return getattr(self.finder, name)


sys.meta_path[:] = map(Hidden, sys.meta_path)
"""


def hide(folder, monkeypatch):
    """From here on no Python that a test starts finds Triton; `folder` gets the file that sees to it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
