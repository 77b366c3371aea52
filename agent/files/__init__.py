"""Files of the image that the agent makes for a host, with a user's rights."""
