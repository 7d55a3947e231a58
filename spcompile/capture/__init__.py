"""From the graph that Dynamo gives to a pure graph of one device."""
