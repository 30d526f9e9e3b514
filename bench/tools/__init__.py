"""What all rooms measure with: timing, memory, files of results, the environment, arguments."""
