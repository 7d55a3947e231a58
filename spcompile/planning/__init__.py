"""Which mesh and which options: candidates, each compiled at two small depths, and ranked by predicted time."""
