"""What must hold of a graph: its laws, the states of its values, and all ranks run in one process."""
