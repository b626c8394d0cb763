"""spalign: make a language model trustworthy first and helpful second (SPA, AAAI 2026)."""

__version__ = "0.1.0"
