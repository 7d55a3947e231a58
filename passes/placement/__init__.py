"""Where everything goes: axis by axis values split, reshards inserted, shapes lowered."""
