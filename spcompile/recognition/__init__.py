"""What written-out tensor code means: attention, softmax, groups of heads."""
