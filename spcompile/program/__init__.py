"""The compiler at work: passes run over a captured graph, and what comes out becomes a callable."""
