"""Report what a run chose, why, and what that cost, as one page or in the terminal: ``grace-ds report``."""
