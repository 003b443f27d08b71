"""What several folders need and none of them is about."""
