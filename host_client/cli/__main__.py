"""`python -m host_client.cli`, the same as `microguest`."""

import sys

from host_client.cli import main

sys.exit(main())
