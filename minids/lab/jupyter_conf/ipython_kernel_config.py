"""Kernels of .venv: errors only, so no notice about TCP on every start. `make setup` copies it to .venv/etc/ipython."""

c = get_config()  # noqa: F821
c.IPKernelApp.log_level = 40
