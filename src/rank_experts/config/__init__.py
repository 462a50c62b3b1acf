"""`RankExpertConfig`, its checks, and reading it from a file."""
