"""What the guest does without: settings of the kernel, paths and modules."""
