"""The help of the command line, from an index of all options: neither JAX nor the settings are imported for it."""
