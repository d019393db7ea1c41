"""Requests, results, errors and files: what every other package uses."""
