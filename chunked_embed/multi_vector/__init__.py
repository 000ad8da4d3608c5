"""For sentence-transformers' ``MultiVectorEncoder``: ``losses`` are drop-ins. Importing this does not import the
library.
"""
