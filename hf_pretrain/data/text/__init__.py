"""From files to documents of text: which files, of which kind, line by line and row by row.

search -> kinds -> lines, rows -> files -> datasets; docstrings is the text that every machine has.
"""
