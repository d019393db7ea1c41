"""The JSON-RPC daemon."""
