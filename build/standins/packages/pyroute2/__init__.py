"""Takes the place of pyroute2's front page in the frozen guest.

The original imports every client the package has, and with them asyncio. The guest uses the message
classes below `pyroute2.netlink` only, over sockets of its own.
"""
