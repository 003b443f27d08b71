"""``grace-ds report``: one page, or a screen, about what a run chose, why, and what that cost."""
