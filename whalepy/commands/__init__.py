"""The commands of `whalepy`, one file each. A file imports torch only inside the function that needs it."""
