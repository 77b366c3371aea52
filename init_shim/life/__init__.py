"""From the first child to the end of the machine: the agent, the workload, memory, power."""
