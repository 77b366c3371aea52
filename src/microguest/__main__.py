"""`python -m microguest`, the same as `microguest`."""

import sys

from microguest.host_client.cli import main

sys.exit(main())
