"""The machine as a whole: what it is, its clock, its identity, its end."""
