"""Where an option of another trainer, or of an older version, lives in this one."""
