"""Calls with the signatures of other libraries, served by autoflash."""
