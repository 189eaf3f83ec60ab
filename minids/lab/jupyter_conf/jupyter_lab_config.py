"""JupyterLab for the lessons: the landing page, loopback and a token, no news prompt, nothing installed by a click."""

from pathlib import Path

c = get_config()  # noqa: F821
c.LabApp.default_url = "/lab/tree/lessons/START.md"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.allow_root = True  # the user of a container or a rented GPU machine is often root
c.LabApp.custom_css = True
c.ServerApp.tornado_settings = {"static_custom_path": [str(Path(__file__).parent / "custom")]}  # there is custom.css
