"""What `cotgrpo bench` measures: how fast this library is on this machine."""
