"""The commands of `gpt2`. What takes long to import is imported where it is used."""
