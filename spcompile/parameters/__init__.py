"""Parameters as DTensors: where each is split, and where its values come from."""
