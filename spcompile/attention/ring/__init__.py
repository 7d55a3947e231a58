"""Ring attention: queries stay, keys and values travel."""
