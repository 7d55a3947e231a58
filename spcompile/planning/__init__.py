"""Which mesh and options to take: candidates, compiled at two small depths and ranked."""
