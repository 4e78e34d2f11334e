"""Keeps pytest from importing the application: Quix Streams is only in the venv of the benchmark."""

collect_ignore = ["app.py"]
