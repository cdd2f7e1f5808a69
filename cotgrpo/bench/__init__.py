"""`cotgrpo bench`: how fast this library is on this machine, part by part."""
