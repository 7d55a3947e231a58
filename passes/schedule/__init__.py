"""When things happen: on the final forward and backward graphs."""
