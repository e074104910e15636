"""Model files: read strictly, written whole, converted, found on the hub."""
