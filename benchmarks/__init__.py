"""Measurements of resfuse against its peers; see README.md in this folder.  Not part of the installed package."""
