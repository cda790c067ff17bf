"""Tables: what people claim, as typed rows. Standard library only."""
