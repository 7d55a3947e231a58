"""Which scores count: masks, dropout, positions; and what a kernel must offer."""
