"""Every transformer class of diffusers: a small one, quantized, loaded, and held against itself.

A class says how it is made and called by two signatures. `options` shrinks the first, `inputs` fills
the second, and `prove` does the rest, the same for all. What a signature leaves open, because a
default is None or a width follows from another, stands in tables of data by class.
"""
