"""What a program runs on: named mesh axes, how a dim is laid out over one, how fast ranks talk and compute."""
