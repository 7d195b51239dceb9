"""What `python -m sagan_attn <command>` runs: one file a command, with `add_arguments` and `run`."""
