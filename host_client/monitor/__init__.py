"""The process that a machine belongs to. It is started as a program, and imported by nobody."""
