"""megalm pre-trains base language models. See README.md for a map of the rooms."""

__version__ = "0.1.0"
