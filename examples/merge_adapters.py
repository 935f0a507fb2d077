"""PEFT adapters of different ranks, merged offline: no base model is loaded."""

import fedloom


def main() -> None:
    """Two sites train on their own, each with a rank of its own; one adapter comes out."""
    folders = []
    for site, rank in (("bank", 8), ("lab", 4)):
        alone = {"federation.participants": [site], "lora.r": rank, "lora.lora_alpha": 2.0 * rank}
        bed = fedloom.testbed(settings={**alone, "data.heldout": None})
        run = fedloom.run(bed, method="fedit", num_rounds=1, out=f"alone-{site}")
        folders.append(run.adapter_folder)

    merge = fedloom.merge(folders, weights=[1200, 800], energy=1)  # 1: exact
    print(merge.preview()[0])
    print("written to", merge.save("merged"))


if __name__ == "__main__":
    main()
