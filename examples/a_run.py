"""One run: play it, read its numbers, look into a payload."""

import fedloom


def main() -> None:
    """Five rounds of FedSRD at four sites."""
    bed = fedloom.testbed()
    run = fedloom.run(bed, method="fedsrd", num_rounds=5)
    for domain, score in run.scores.items():
        print(f"{domain:8} {100 * score:5.1f} %")
    print(f"{run.bytes_up} bytes up, {run.bytes_down} down, {len(run.payloads)} payloads")
    run.plot().save("curve.png")

    described = fedloom.describe(run.payloads[-1])
    print(f"the last payload has {described.size} bytes: {dict(described.parts)}")
    first = described.tensors[0]
    print(f"{first.name}: {first.values} values of {first.shape} as {first.coding}, {first.form}")


if __name__ == "__main__":
    main()
