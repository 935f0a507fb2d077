"""Noise for privacy: where it comes from, and what it is worth. Knows no model, no data and no torch.

stream.py      secret random numbers from a key
accounting.py  ε and attack risk of noise, and the noise for an ε: the one door to dp-accounting and riskcal
"""
