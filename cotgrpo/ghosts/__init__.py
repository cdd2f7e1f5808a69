"""Ghost replies: who writes them, and whether what they say is right."""
