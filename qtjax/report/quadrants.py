"""The four quadrants of the EU plane in words: arXiv 2509.23873, figure 1a and appendix E.1."""

QUADRANT_NAMES = {1: "harmful noise", 2: "misconception", 3: "redundant", 4: "calibration"}
