"""Methods side by side: the same data, the same seeds, one table, one picture."""

import fedloom

METHODS = ["fedit", "fedsrd", "florist:paper"]


def main() -> None:
    """Two seeds of each; takes some minutes with the testbed's own number of rounds."""
    bed = fedloom.testbed(settings={"federation.num_rounds": 4, "federation.eval_every": 2})
    found = fedloom.compare(bed, METHODS, seeds=2)
    print(found)
    for method, scores in found.scores.items():
        print(method, [f"{100 * score:.1f}" for score in scores])
    found.plot().save("compare.png")


if __name__ == "__main__":
    main()
