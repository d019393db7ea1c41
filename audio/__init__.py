"""Sound as arrays and files: levels, splicing, decoding, encoding, tags, loudness, analysis."""
