"""What a machine is booted from: manifest, initramfs archives, the template of a blank disk."""
