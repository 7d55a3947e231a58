"""The compiler at work: passes run over a graph, and the result becomes a callable."""
