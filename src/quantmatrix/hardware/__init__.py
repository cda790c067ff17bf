"""Hardware: the machine, how it is probed, and which optional packages it has."""
