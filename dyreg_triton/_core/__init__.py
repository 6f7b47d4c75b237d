"""What every part of the library stands on, and nobody outside needs to know."""
