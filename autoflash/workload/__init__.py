"""Which problems does a model ask for, and how often? Known models, and files of problems."""
