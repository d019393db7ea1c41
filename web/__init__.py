"""The Gradio page and its named API."""
