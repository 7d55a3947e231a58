"""What a program runs on: mesh axes, layouts of a dim over one, speeds."""
