"""What ops cost in time and memory, and an order in which communication hides."""
