"""What the backward gets saved and what it makes again, by a budget of bytes."""
