"""What a command does around the pure steps: the host loop, checkpoints, evaluation, reports."""
