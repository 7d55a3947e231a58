"""Where everything goes: axis by axis values are split, reshards placed, shapes lowered, attention spread."""
