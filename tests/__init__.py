"""A package, so that another one of this name that happens to be installed is not found in its place."""
