"""How long tests wait: in one place, because a busy machine is no fault of what is tested.

PATIENCE is reached only by a failure, so that its length costs nothing. SLACK goes on top of what
a test bounds from above: small against what it would take if the bound did not hold.
"""

PATIENCE = 120.0  # seconds for what has to come
SLACK = 10.0  # seconds that a machine slowed to a fifth may add to what is measured
