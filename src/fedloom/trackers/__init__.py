"""A run's numbers for the trackers that people have: TensorBoard, MLflow, Weights & Biases, trackio.

Everything is made from the run's folder, live and afterwards by the same code: `follow` reads, `points` adds up, and a
row of `sinks` sends.
"""
