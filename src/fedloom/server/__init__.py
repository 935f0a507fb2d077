"""Who is asked: the rounds of a run, and the sites when they live in this process."""
