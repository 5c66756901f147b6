"""Search for the sub-networks worth keeping."""
