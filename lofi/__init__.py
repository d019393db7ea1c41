"""The JSON-RPC daemon for editors: `python app.py daemon`."""
