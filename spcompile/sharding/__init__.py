"""Where the values of a graph are split: found from factors, made explicit by reshards, lowered to one rank."""
