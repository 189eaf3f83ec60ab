"""JupyterLab for the lessons: loopback and a token, no news prompt, nothing installed by a click."""

c = get_config()  # noqa: F821
c.ServerApp.ip = "127.0.0.1"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
