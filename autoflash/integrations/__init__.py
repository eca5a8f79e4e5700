"""Where people already call attention: each module registers on demand, and needs its library."""
