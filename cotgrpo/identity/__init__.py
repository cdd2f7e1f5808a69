"""What a run was given, kept in its folder: the held-out split, and a record of every input of a stage."""
