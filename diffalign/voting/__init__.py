"""What people chose between images: the log of votes, what counts of it, and which images to ask about next."""
