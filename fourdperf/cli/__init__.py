"""The command line: one module per sub-command, which holds a function of the same name."""
