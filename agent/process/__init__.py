"""Processes: started, watched, attached to, ended; what they stand in and on."""
