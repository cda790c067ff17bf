"""Suites: one check each, run for every cell whose row names it: `pytest --pyargs quantmatrix.suites`.

They come with the package, so that a project with tables of its own runs them as we do. What a suite asks for
(`cell`, `workbench`, `proof`) is described in `quantmatrix.harness.plugin`.
"""
