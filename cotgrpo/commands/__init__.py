"""The commands, one file each: arguments in, rooms called.

A command's module has `add_options(parser)`, which adds its options, and `run(options, console)`. Its docstring is the
description in its help. `bench` has a `main(arguments)` instead, since it runs without the command line's library too.
"""
