"""The neural networks, their files and downloads."""
