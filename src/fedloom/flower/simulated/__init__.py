"""Flower's engine on one machine: Flower's Simulation Runtime, with Ray's processes as the sites."""
