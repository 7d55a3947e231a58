"""Where values are split: found from factors, made explicit, lowered to one rank."""
