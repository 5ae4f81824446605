"""Training judges of images: teachers that reason before they score, students that answer in one token (Z-Reward)."""
