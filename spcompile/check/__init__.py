"""What must hold of a graph: its laws, its states, and a run of all ranks."""
