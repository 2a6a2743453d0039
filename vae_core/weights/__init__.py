"""Weight files: read without running code, recognised, downloaded."""
