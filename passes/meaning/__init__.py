"""What the graph means: attention, masks, softmax, losses and dropout get names."""
