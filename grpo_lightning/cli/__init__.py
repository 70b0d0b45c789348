"""The command line: LightningCLI with our sections, checks before anything is written, errors of one line."""
