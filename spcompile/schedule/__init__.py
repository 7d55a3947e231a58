"""What ops take in time and memory, and the order in which communication hides behind compute."""
