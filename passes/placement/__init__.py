"""Where everything goes: axis by axis values are split, reshards inserted, shapes lowered."""
