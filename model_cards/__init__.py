"""The template that every drafter's card is written from, and the real card of the quickstart run.

A package with a file of its own: `importlib.resources` cannot open a namespace package that was
installed in editable mode (NotADirectoryError on Python 3.11).
"""
