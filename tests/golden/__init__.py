"""What the engine did to weights, recorded: runs of every recipe that a rebuilt engine has to repeat."""
