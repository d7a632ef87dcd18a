"""Pure functions without parameters or meshes; each fast one has a slow twin."""
