"""What a run leaves behind: written, read, resumed, swept over."""
