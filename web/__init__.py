"""The page and its API, built with Gradio."""

import os

# Gradio reads these when it is imported, which the modules of this package do.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
