"""What flow control would do, computed beside what it does."""
