"""Samples of a LeRobot dataset (format v3), preprocessed as pi0.5's own code does."""
